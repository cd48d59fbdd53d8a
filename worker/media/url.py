"""Turns media in a job's input, a URL or bare base64, into a URL for the engine. Pure."""

import base64
import re

from worker.media.formats import HEAD_BYTES, fits, media_type

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def from_text(text: str, kind: str) -> str:
    """Return `text` if it is a URL, else the `data:` URL of the base64 that it contains.

    `kind` is "image", "video", "audio" or "document". A GIF is accepted as an image and as a video, a video as a sound.

    Raises:
        ValueError: `text` is neither; the message continues a sentence that starts with the field's name.
    """
    if _SCHEME.match(text):
        return text
    encoded = "".join(text.split())
    try:
        detected = media_type(base64.b64decode(encoded[: HEAD_BYTES // 3 * 4], validate=True))
    except ValueError:
        detected = None
    if detected is None:
        raise ValueError(
            f"is neither a URL (https:, http:, data:) nor a base64 {kind} file: its first bytes match no known format."
        )
    if not fits(detected, kind):
        raise ValueError(f"contains {detected} where {kind} data is expected.")
    return f"data:{detected};base64,{encoded}"

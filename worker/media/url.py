"""What a person types as an image or a video, a URL or bare base64, becomes a URL that the engine takes. Pure."""

import base64
import re

from worker.media.formats import HEAD_BYTES, fits, media_type

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def from_text(text: str, kind: str) -> str:
    """Return `text` if it is a URL, else a `data:` URL of the base64 that it holds.

    `kind` is "image" or "video"; a GIF may be either.

    Raises:
        ValueError: neither; the message reads on after the name of the field.
    """
    if _SCHEME.match(text):
        return text
    encoded = "".join(text.split())
    found = _media_type(encoded)
    if found is None:
        raise ValueError(
            f"is neither a URL (https:, http:, data:) nor the base64 of a {kind} file: "
            "its first bytes are those of no known format."
        )
    if not fits(found, kind):
        raise ValueError(f"holds {found}, which is no {kind}.")
    return f"data:{found};base64,{encoded}"


def _media_type(encoded: str) -> str | None:
    """Tell the media type from the first bytes of some base64; None if it is none or of no known format."""
    try:
        return media_type(base64.b64decode(encoded[: HEAD_BYTES // 3 * 4], validate=True))
    except ValueError:
        return None

"""Bare base64 becomes a `data:` URL; a URL is left unchanged."""

import base64
import io

import pytest
from PIL import Image

from worker.media import url as media_url


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, kind)
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_base64_of_an_image_becomes_a_data_url(kind: str) -> None:
    text = encoded(image(kind))
    assert media_url.from_text(text, "image") == f"data:image/{kind.lower()};base64,{text}"


@pytest.mark.parametrize(
    ("head", "media_type"),
    [
        pytest.param(b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "video/mp4", id="mp4"),
        pytest.param(b"\x00\x00\x00\x14ftypqt  \x00\x00\x02\x00", "video/quicktime", id="mov"),
        pytest.param(b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm", "video/webm", id="webm"),
        pytest.param(b"RIFF\x00\x00\x00\x00AVI LIST", "video/x-msvideo", id="avi"),
        pytest.param(b"GIF89a\x08\x00\x08\x00\x80\x00", "image/gif", id="gif"),
    ],
)
def test_base64_of_a_video_becomes_a_data_url(head: bytes, media_type: str) -> None:
    text = encoded(head + bytes(30))
    assert media_url.from_text(text, "video") == f"data:{media_type};base64,{text}"


@pytest.mark.parametrize(
    ("head", "kind", "media_type"),
    [
        pytest.param(b"RIFF\x00\x00\x00\x00WAVEfmt ", "audio", "audio/wav", id="wav"),
        pytest.param(b"ID3\x03\x00\x00\x00\x00\x10\x00", "audio", "audio/mpeg", id="mp3 with a tag"),
        pytest.param(b"\x00\x00\x00\x20ftypisom\x00\x00\x02\x00", "audio", "video/mp4", id="mp4"),
        pytest.param(b"%PDF-1.7\n", "document", "application/pdf", id="pdf"),
    ],
)
def test_base64_of_a_sound_or_a_document_becomes_a_data_url(head: bytes, kind: str, media_type: str) -> None:
    text = encoded(head + bytes(60))
    assert media_url.from_text(text, kind) == f"data:{media_type};base64,{text}"


@pytest.mark.parametrize("url", ["https://example.org/a.png", "data:image/png;base64,AAAA", "file:///a.png"])
def test_a_url_is_left_unchanged(url: str) -> None:
    assert media_url.from_text(url, "image") == url


def test_line_breaks_in_base64_are_removed() -> None:
    text = base64.encodebytes(image("PNG")).decode()
    assert "\n" not in media_url.from_text(text, "image")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a cat.png", id="file name"),
        pytest.param("", id="empty"),
        pytest.param(encoded(b"hello, I am a text of some length"), id="base64 of text"),
        pytest.param("é" * 40, id="not ASCII"),
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither a URL"):
        media_url.from_text(text, "image")


def test_a_video_is_refused_as_an_image() -> None:
    with pytest.raises(ValueError, match="contains video/mp4 where image data is expected"):
        media_url.from_text(encoded(b"\x00\x00\x00\x20ftypisom" + bytes(30)), "image")

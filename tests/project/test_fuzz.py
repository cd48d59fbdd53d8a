"""Generated jobs, bodies, streams, media files, addresses and secrets.

`make fuzz` runs more of them than the test suite, and then fuzzing guided by coverage. Media are the same each time in
the test suite: a decoder's library that crashes would end the tests.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import files, media, targets, texts
from tests.support import hostile_images
from worker import redaction
from worker.errors import MediaError
from worker.media import structure
from worker.media.decoders import Look, SoundForm
from worker.request import shape

CORPUS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2000"))
IS_LONG = "FUZZ_EXAMPLES" in os.environ
without_limit: Any = {"deadline": None, "suppress_health_check": list(HealthCheck)}
each_time_the_same: Any = {"derandomize": not IS_LONG, **without_limit}

KEYS = """
messages prompt openai_route openai_input route body method stream sampling_params image images video videos
apply_chat_template role content type image_url url model tools
""".split()
WORDS = """
/v1/chat/completions /v1/completions v1/models /v1/../ping /v1/chat/completions?x=1 /metrics // user text image_url POST
GET true data:image/png;base64,AAAA https://example.org/a.png
""".split()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WORDS)
names = st.sampled_from(KEYS) | st.text(max_size=5)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=8
)

VALID: tuple[Any, ...] = (
    {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "sampling_params": {"max_tokens": 5}},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
    {"prompt": "Hello", "image": "AAAA", "videos": ["https://example.org/v.mp4"], "max_tokens": 3},
    {"prompt": [1, 2, 3], "stream": False},
    {"openai_route": "/v1/chat/completions", "openai_input": {"messages": [], "stream": True}},
    {"openai_route": "/v1/models"},
    {"route": "/tokenize", "body": {"prompt": "Hello"}, "method": "POST"},
)


@st.composite
def mutations(draw: Any) -> Any:
    """Return a valid input in which some values were replaced, removed or moved."""
    mutated = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    for _ in range(draw(st.integers(1, 3))):
        holder = mutated
        while isinstance(holder, dict | list) and holder:
            key = draw(st.sampled_from(sorted(holder)) if isinstance(holder, dict) else st.integers(0, len(holder) - 1))
            inner = holder[key]
            if not isinstance(inner, dict | list) or not inner or draw(st.booleans()):
                if isinstance(holder, dict) and draw(st.booleans()):
                    del holder[key]
                    key = draw(st.sampled_from(KEYS))
                holder[key] = draw(json_values)
                break
            holder = inner
    return mutated


@pytest.mark.timeout(600)
@given(mutations() | json_values)
@settings(max_examples=EXAMPLES, **without_limit)
def test_any_job_is_a_call_or_an_error_with_a_message(job_input: Any) -> None:
    targets.job(job_input)


PARTS = (b"data: {}\n\n", b"data: [DONE]\n\n", b"\r\n\r\n", b"\n", b":", b'data: {"error": {"code": 400}}\n\n')
pieces = st.sampled_from(PARTS)


@given(st.lists(pieces | st.binary(max_size=30), max_size=20).map(b"".join), st.integers(1, 40))
@settings(max_examples=3_000, **without_limit)
def test_any_stream_is_split_between_its_events(data: bytes, size: int) -> None:
    targets.stream(data, size)


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_inputs_that_failed_once(decoding: media.Decoding, file: Path) -> None:
    targets.everything(file.read_bytes(), decoding)


@pytest.mark.parametrize("depth", [500, 990, 100_000])
def test_deeply_nested_input(depth: int) -> None:
    targets.job_text(b'{"prompt": "?", "x": ' + b"[" * depth + b"]" * depth + b"}")


# ---- Bodies

NEAR = st.sampled_from((0, 1, -1))
BYTES = (b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b" ", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\0")
VALUES = (
    b"0",
    b'"a"',
    b'"\\\\"',
    b'"\\""',
    b'"[{,\\u0041"',
    '"\N{SNOWMAN}"'.encode(),
    b"[]",
    b"{}",
    b'{"a":1}',
    b'["[",{"k":[]}]',
)


@st.composite
def large_bodies(draw: Any) -> bytes:
    """Return a body with about as many values, or as deep, as a limit allows; possibly damaged at one place."""
    value = draw(st.sampled_from(VALUES))
    limit = draw(st.sampled_from((10, shape.MAX_CONTAINERS, shape.MAX_CONTAINERS // 2, shape.MAX_STRINGS)))
    depth = draw(st.sampled_from((0, 1, shape.MAX_DEPTH - 2, shape.MAX_DEPTH - 1, shape.MAX_DEPTH)))
    body: bytes = b"[" * depth + b"[" + b",".join([value] * (limit + draw(NEAR))) + b"]" + b"]" * depth
    if draw(st.booleans()):
        place = draw(st.integers(0, len(body)))
        body = body[:place] + draw(st.sampled_from((b'"', b"\\", b"]", b"[", b"", b"\xff", b","))) + body[place + 1 :]
    return body


@given(large_bodies())
@settings(max_examples=EXAMPLES // 200, **without_limit)
def test_bodies_near_the_limits(body: bytes) -> None:
    parsed(body)


@given(st.lists(st.sampled_from((*VALUES, *BYTES)), max_size=30).map(b"".join))
@settings(max_examples=EXAMPLES // 4, **without_limit)
def test_bodies_of_any_structure(body: bytes) -> None:
    parsed(body)


@pytest.mark.parametrize(("more", "is_accepted"), [(0, True), (1, False)])
def test_the_most_commas(more: int, is_accepted: bool) -> None:
    body = b"[" + b"7," * (shape.MAX_COMMAS + more) + b"7]"
    assert targets.is_accepted(body) == is_accepted
    parsed(body)


def parsed(body: bytes) -> None:
    try:
        targets.body(body)
    except (ValueError, RecursionError):
        return


# ---- Media files

IMAGES, SOUNDS, FILMS = files.images(), files.sounds(), files.films()
places = st.fractions(0, 1, max_denominator=10_000)
edits = st.builds(files.Edit, st.sampled_from(sorted(files.EDITS)), places, st.integers(0, 2**32 - 1))


def damaged(whole: Mapping[str, bytes]) -> Any:
    """Return a strategy for some of these files with one to four changes."""
    return st.builds(files.edited, st.sampled_from(list(whole.values())), st.lists(edits, min_size=1, max_size=4))


@pytest.fixture(scope="module", name="decoding")
def decoding_here() -> Iterator[media.Decoding]:
    with media.Decoding() as decoding:
        yield decoding


@pytest.fixture(scope="module", name="scaling")
def decoding_that_scales_down() -> Iterator[media.Decoding]:
    with media.Decoding(downscale_pixels=100) as decoding:
        yield decoding


@pytest.mark.parametrize("name", IMAGES)
def test_whole_images(decoding: media.Decoding, name: str) -> None:
    for look in media.LOOKS:
        assert decoding.image(IMAGES[name], look)


@pytest.mark.parametrize("name", SOUNDS)
def test_whole_sounds(decoding: media.Decoding, name: str) -> None:
    for form in media.FORMS:
        assert decoding.sound(SOUNDS[name], form)


@given(data=damaged(IMAGES | files.claims()), look=st.sampled_from(media.LOOKS))
@settings(max_examples=EXAMPLES // 4, **each_time_the_same)
def test_damaged_images(decoding: media.Decoding, data: bytes, look: Look) -> None:
    media.gates(data)
    decoding.image(data, look)


@given(data=damaged(IMAGES), look=st.sampled_from(media.LOOKS))
@settings(max_examples=EXAMPLES // 10, **each_time_the_same)
def test_damaged_images_that_are_scaled_down(scaling: media.Decoding, data: bytes, look: Look) -> None:
    scaling.image(data, look)


@given(data=damaged(SOUNDS), form=st.sampled_from(media.FORMS))
@settings(max_examples=EXAMPLES // 8, **each_time_the_same)
def test_damaged_sounds(decoding: media.Decoding, data: bytes, form: SoundForm) -> None:
    media.gates(data)
    decoding.sound(data, form)


@given(damaged(FILMS))
@settings(max_examples=EXAMPLES // 8, **each_time_the_same)
def test_damaged_videos(data: bytes) -> None:
    media.gates(data)


PIECES = (b"\xff\xfe\0\2", b"\xff\xd0", b"\xff", b"\0\0\0\x08free", b"\0\0\0\x08trak", b"\xff\xda", b"\0", b"c=IN IP")


@given(
    st.sampled_from([*IMAGES.values(), *SOUNDS.values(), *FILMS.values()]),
    places,
    st.sampled_from(PIECES) | st.binary(),
)
@settings(max_examples=EXAMPLES // 100, **without_limit)
def test_files_with_a_megabyte_of_one_piece(data: bytes, place: Fraction, piece: bytes) -> None:
    start = int(place * len(data))
    media.gates(data[:start] + piece * (1_000_000 // max(1, len(piece))) + data[start:])


numbers = st.integers(-1, 1 << 33) | st.sampled_from(files.NUMBERS) | st.floats() | st.none() | st.tuples(st.integers())


@given(
    st.dictionaries(st.sampled_from((256, 257, 322, 323)), numbers), st.integers(1, 1 << 16), st.integers(1, 1 << 16)
)
@settings(max_examples=EXAMPLES // 4, **without_limit)
def test_any_tags_of_tiles(tags: dict[int, object], width: int, height: int) -> None:
    try:
        structure.check_tiles(tags, width, height)
    except MediaError:
        return
    tile = tags.get(322), tags.get(323)
    if isinstance(tile[0], int) and isinstance(tile[1], int):
        assert tile[0] * tile[1] <= max(structure.MAX_TILE_PIXELS, 4 * width * height)


@given(st.floats(), st.floats(), st.floats(1, 10_000))
@settings(max_examples=EXAMPLES // 4, **without_limit)
def test_any_frame_rate(frames: float, rate: float, seconds: float) -> None:
    try:
        structure.check_frame_rate(frames, rate, seconds)
    except MediaError:
        return
    assert 1 <= frames <= structure.MAX_FRAME_RATE * seconds
    assert 0 < rate <= structure.MAX_FRAME_RATE


# ---- Addresses and secrets


@given(st.text(max_size=60) | st.from_regex(r"[\[]?[0-9a-fx:.%\]]{0,40}", fullmatch=True))
@settings(max_examples=EXAMPLES // 4, **without_limit)
def test_any_host(text: str) -> None:
    texts.host(text)


@given(st.ip_addresses(v=4).map(int) | st.integers(0, 2**32 - 1))
@settings(max_examples=EXAMPLES // 4, **without_limit)
def test_any_address(number: int) -> None:
    texts.address(number)


secrets = st.builds(lambda before, after: before + texts.CORE + after, st.text(max_size=12), st.text(max_size=12))


@given(secrets)
@settings(max_examples=EXAMPLES // 4, **without_limit)
def test_any_secret(secret: str) -> None:
    texts.secret(secret)


@given(secrets.filter(lambda text: "\0" not in text))
@settings(max_examples=EXAMPLES // 4, **without_limit)
def test_secrets_on_a_command_line(secret: str) -> None:
    texts.command_line(secret)


# ---- Known defects: remove the mark of a test once it passes.


def refused(check: Callable[[bytes], None], data: bytes) -> bool:
    try:
        check(data)
    except MediaError:
        return True
    return False


def test_segments_after_a_byte_that_is_no_marker() -> None:
    comment, whole = b"\xff\xfe\0\2", IMAGES["jpeg"]
    data = whole[:2] + comment + b"\0" + comment * (structure.MAX_JPEG_SEGMENTS + 1) + whole[2:]
    assert refused(structure.check_jpeg, data)


def test_scans_behind_a_sequential_frame_that_decoders_do_not_see() -> None:
    whole = hostile_images.progressive_jpeg(64, 2 * structure.MAX_JPEG_SCANS)
    frame = b"\xff\xc0\0\x0b\x08\0\x08\0\x08\1\1\x11\0" + b"\xff\xda\0\x08\1\1\0\0?\0"
    comment = b"\xff\xfe" + (2 + len(frame)).to_bytes(2, "big")
    data = whole[:2] + b"\xff\xfe\0\2" + b"\xff\0\0\6" + comment + frame + whole[2:]
    assert refused(structure.check_jpeg, data)


@pytest.mark.parametrize("outer", ["udta", "edts", "dinf", "mvex", "tref", "wave", "sinf", "schi", "ilst"])
def test_frames_claimed_in_an_unusual_box(outer: str) -> None:
    count = 1_000_000
    data = box("stsz", bytes(4) + (1).to_bytes(4, "big") + count.to_bytes(4, "big"))
    for name in (outer, "stbl", "minf", "mdia", "trak", "moov"):
        data = box(name, data)
    assert refused(structure.check_mp4, data)


def box(name: str, content: bytes) -> bytes:
    return (8 + len(content)).to_bytes(4, "big") + name.encode() + content


def test_deeply_nested_boxes() -> None:
    media.gates(b"\0\0\0\0moov" * 100_000)


def test_a_secret_in_a_quoted_json_text() -> None:
    value = json.dumps({"token": texts.CORE + "\\tail"})
    remove = redaction.remover(redaction.secrets_in({"MODEL_LOADER_EXTRA_CONFIG": value}))
    assert texts.CORE not in remove(f"invalid value: {value!r}")

"""Speech to text on the real engine: from the queue, over HTTP, and with OpenAI's client.

The tiny speech model writes down the sounds of telephone keys, in German or English.
"""

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import API_KEY, REQUEST_SECONDS, Endpoint, HttpWorker, SpeechWorker
from tests.support import speech
from tests.support.links import Server

TRANSCRIBE, TRANSLATE = "/v1/audio/transcriptions", "/v1/audio/translations"
SOUND = speech.wav("123")
TEXT, ENGLISH = "eins zwei drei", "one two three"
BASE64 = base64.b64encode(SOUND).decode()
DATA_URL = f"data:audio/wav;base64,{BASE64}"


@pytest.fixture(scope="module")
def queue(speech_worker: SpeechWorker) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=speech_worker.endpoint.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(speech_worker: SpeechWorker) -> Iterator[httpx.Client]:
    with speech_worker.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(speech_worker: SpeechWorker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{speech_worker.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def result_of(queue: httpx.Client, job_input: Any) -> Any:
    """Return what a job yields, or the error with which it fails."""
    job = queue.post("runsync", json={"input": job_input}).json()
    return json.loads(job["error"]) if job["status"] == "FAILED" else job["output"][0]


def text_of(queue: httpx.Client, **job_input: Any) -> str:
    """Return the text that a job yields."""
    text: str = result_of(queue, job_input)["text"]
    return text


def post(http: httpx.Client, route: str = TRANSCRIBE, **body: Any) -> Any:
    """Return the answer to a JSON body."""
    return http.post(route, json=body).json()


def upload(http: httpx.Client, data: bytes = SOUND, **fields: Any) -> Any:
    """Return the answer to a form."""
    return http.post(TRANSCRIBE, files={"file": ("speech.wav", data)}, data=fields).json()


# ---- Words


@pytest.mark.parametrize("file", [DATA_URL, BASE64, "link"], ids=["a data URL", "base64", "a link"])
def test_every_way_of_sending_a_sound_gives_its_words(
    queue: httpx.Client, http: httpx.Client, links: Server, file: str
) -> None:
    file = f"{links.url}/speech/123-de" if file == "link" else file
    assert text_of(queue, audio=file) == TEXT
    assert text_of(queue, route=TRANSCRIBE, body={"file": file, "model": "tiny"}) == TEXT
    assert text_of(queue, openai_route=TRANSCRIBE, openai_input={"file": file}) == TEXT
    assert post(http, file=file)["text"] == TEXT


def test_a_form_gives_the_words(http: httpx.Client) -> None:
    assert upload(http) == {"text": TEXT, "usage": {"type": "duration", "seconds": 2}}


@pytest.mark.parametrize("form", speech.CODECS)
def test_every_format_gives_the_words(http: httpx.Client, form: str) -> None:
    assert upload(http, speech.encoded("123", form))["text"] == TEXT


def test_words_are_translated(queue: httpx.Client, http: httpx.Client) -> None:
    assert text_of(queue, audio=BASE64, task="translate") == ENGLISH
    assert text_of(queue, route=TRANSLATE, body={"file": BASE64}) == ENGLISH
    assert post(http, TRANSLATE, file=BASE64)["text"] == ENGLISH


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param({"language": "en"}, ENGLISH, id="language"),
        pytest.param({"prompt": "ONE TWO"}, TEXT.upper(), id="prompt"),
        pytest.param({"max_completion_tokens": 2}, "eins zwei", id="number"),
        pytest.param({"sampling_params": {"max_completion_tokens": 1}}, "eins", id="sampling_params"),
        pytest.param({"use_beam_search": False, "seed": None}, TEXT, id="boolean and null"),
    ],
)
def test_fields_reach_the_model(queue: httpx.Client, fields: dict[str, Any], text: str) -> None:
    assert text_of(queue, audio=BASE64, task="transcribe", **fields) == text
    if "sampling_params" not in fields:
        assert text_of(queue, route=TRANSCRIBE, body={"file": BASE64, **fields}) == text


def test_segments_have_times(queue: httpx.Client, client: openai.OpenAI) -> None:
    sound = speech.wav("12 3")
    body = {
        "file": base64.b64encode(sound).decode(),
        "response_format": "verbose_json",
        "timestamp_granularities": ["segment"],
    }
    answer = client.audio.transcriptions.create(
        model="tiny", file=sound, response_format="verbose_json", timestamp_granularities=["segment"]
    )
    assert (answer.language, answer.text, answer.duration) == ("de", "eins zwei drei", 2.5)
    assert answer.segments
    times = [(segment.text, round(segment.start, 1), round(segment.end, 1)) for segment in answer.segments]
    assert times == [("eins zwei", 0.0, 0.8), ("drei", 1.8, 2.1)]
    assert answer.model_dump(mode="json", exclude_unset=True) == result_of(queue, {"route": TRANSCRIBE, "body": body})


def test_a_long_sound_is_written_down_in_chunks(queue: httpx.Client) -> None:
    sound = base64.b64encode(speech.wav("1234567890*#", "en")).decode()
    assert text_of(queue, audio=sound) == "one two three four five six seven eight nine zero star hash"


def test_silence_has_no_words(http: httpx.Client) -> None:
    assert upload(http, speech.silence())["text"] == ""


# ---- OpenAI's client


def test_openai_client(client: openai.OpenAI) -> None:
    transcript = client.audio.transcriptions.create(model="tiny", file=("speech.wav", SOUND))
    with pytest.warns(DeprecationWarning, match="deprecated"):
        translation = client.audio.translations.create(model="tiny", file=("speech.wav", SOUND))
    assert (transcript.text, translation.text) == (TEXT, ENGLISH)


def test_openai_client_sends_json_to_the_queue(speech_worker: SpeechWorker) -> None:
    with openai.OpenAI(base_url=f"{speech_worker.endpoint.url}/openai/v1", api_key="key", max_retries=0) as client:
        answer = client.post("/audio/transcriptions", body={"file": DATA_URL}, cast_to=openai.types.audio.Transcription)
    assert answer.text == TEXT


def test_openai_client_streams(client: openai.OpenAI) -> None:
    stream: Any = client.audio.transcriptions.create(model="tiny", file=SOUND, stream=True)
    chunks = [chunk.model_dump() for chunk in stream]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == TEXT


def test_text_is_json_as_in_vllm_and_subtitles_are_refused(client: openai.OpenAI) -> None:
    text = client.audio.transcriptions.create(model="tiny", file=SOUND, response_format="text")
    assert json.loads(text)["text"] == TEXT
    for subtitles in ("srt", "vtt"):
        with pytest.raises(openai.BadRequestError, match="only support response_format"):
            client.audio.transcriptions.create(model="tiny", file=SOUND, response_format=subtitles)


@pytest.mark.parametrize(("options", "text"), [([], TEXT), (["--translate"], ENGLISH)], ids=["written", "translated"])
def test_the_example_works_in_both_ways(
    speech_worker: SpeechWorker, tmp_path: Path, options: list[str], text: str
) -> None:
    api, _, name = speech_worker.endpoint.url.rpartition("/")
    file = tmp_path / "speech.wav"
    file.write_bytes(SOUND)
    for target in (["--base-url", f"{speech_worker.url}/v1"], ["--api", api, "--endpoint", name]):
        command = [sys.executable, "examples/transcribe.py", str(file), *options, *target]
        output = subprocess.run(command, env={**os.environ, "API_KEY": API_KEY}, capture_output=True, check=True)
        assert output.stdout.decode().strip() == text


# ---- Streams of jobs


@pytest.mark.parametrize(
    "job_input",
    [
        pytest.param({"audio": BASE64, "stream": True, "stream_include_usage": True}, id="shorthand"),
        pytest.param(
            {"route": TRANSCRIBE, "body": {"file": BASE64, "stream": True, "stream_include_usage": True}}, id="route"
        ),
    ],
)
def test_a_job_streams(queue: httpx.Client, job_input: dict[str, Any]) -> None:
    chunks = [chunk for part in queue.post("runsync", json={"input": job_input}).json()["output"] for chunk in part]
    assert {chunk["object"] for chunk in chunks} == {"transcription.chunk"}
    assert "".join(choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]) == TEXT
    assert chunks[-1]["usage"]["completion_tokens"] == 4


# ---- Errors


@pytest.mark.parametrize(
    ("body", "code", "param", "message"),
    [
        pytest.param({}, 400, "file", "'file' is missing, or is not a sound", id="no file"),
        pytest.param({"file": 7}, 400, "file", "'file' is missing, or is not a sound", id="a number"),
        pytest.param({"file": "speech.wav"}, 400, "file", "'file' is neither a URL", id="a name"),
        pytest.param(
            {"file": "data:audio/wav;base64,UklGRgAA"}, 400, "file", "file, a sound: its content", id="no sound"
        ),
        pytest.param(
            {"file": base64.b64encode(speech.encoded("123", "mp4")[:2000]).decode()},
            400,
            "file",
            "file, a sound: it",
            id="damaged",
        ),
        pytest.param({"file": "http://127.0.0.1:1/a"}, 424, "file", "file, a sound: the link's server", id="no server"),
        pytest.param({"file": BASE64, "language": "xx"}, 400, None, "Unsupported language: 'xx'", id="language"),
        pytest.param({"file": BASE64, "vllm_xargs": {"a": 1}}, 400, "vllm_xargs", "'vllm_xargs' must be", id="object"),
        pytest.param({"file": BASE64, "temperature": "hot"}, 400, "body.temperature", "valid number", id="temperature"),
        pytest.param({"file": BASE64, "prompt": "\ud800"}, 400, None, "half of a surrogate pair", id="no Unicode"),
        pytest.param(
            {"file": BASE64, "prompt": "one " * 200}, 400, "input_tokens", "at least", id="a prompt that is too long"
        ),
        pytest.param({"file": BASE64, "model": "gpt-9"}, 404, "model", "`gpt-9` does not exist", id="model"),
    ],
)
def test_errors_name_the_field(
    queue: httpx.Client, http: httpx.Client, body: dict[str, Any], code: int, param: str | None, message: str
) -> None:
    over_http = http.post(TRANSCRIBE, content=json.dumps(body), headers={"content-type": "application/json"})
    errors = [over_http.json()["error"]]
    if "\\ud800" not in json.dumps(body):
        errors.append(result_of(queue, {"route": TRANSCRIBE, "body": body}))
    for error in errors:
        assert (error["code"], error["param"]) == (code, param), error
        assert message in error["message"]
    assert over_http.status_code == code


def test_a_file_that_is_too_large_is_refused(http: httpx.Client) -> None:
    error = upload(http, bytes(speech.LARGEST_BYTES + 1))["error"]
    assert (error["code"], error["param"]) == (413, "file")
    assert error["message"] == f"file, a sound: it has more bytes than MAX_AUDIO_BYTES={speech.LARGEST_BYTES} allows."


def test_a_sound_that_is_too_long_is_refused(http: httpx.Client) -> None:
    for answer in (
        upload(http, speech.silence(speech.LONGEST_SECONDS + 1)),
        post(http, file=base64.b64encode(speech.silence(speech.LONGEST_SECONDS + 1)).decode()),
    ):
        assert answer["error"]["message"] == (
            f"file, a sound: it is longer than VLLM_MAX_AUDIO_DECODE_DURATION_S={speech.LONGEST_SECONDS} allows."
        )
        assert (answer["error"]["code"], answer["error"]["param"]) == (413, "file")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        pytest.param({"data": {"model": "tiny"}}, "'file' is missing, or is not a sound", id="no file"),
        pytest.param({"data": {"file": BASE64}}, "'file' is missing, or is not a sound", id="text"),
        pytest.param({"files": {"file": b"text"}}, "file, a sound: its content matches no known", id="no sound"),
        pytest.param({"files": {"file": b""}}, "file, a sound: it is empty", id="an empty file"),
        pytest.param(
            {"content": b"--a", "headers": {"content-type": "multipart/form-data"}}, "no boundary", id="no boundary"
        ),
    ],
)
def test_wrong_forms_get_words(http: httpx.Client, form: dict[str, Any], message: str) -> None:
    answer = http.post(TRANSCRIBE, **form)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_model_without_speech_says_so(endpoint: Endpoint, http_worker: HttpWorker) -> None:
    with httpx.Client(base_url=endpoint.url, timeout=60) as queue:
        error = result_of(queue, {"audio": BASE64})
    assert (error["code"], error["message"]) == (404, f"The loaded model does not support '{TRANSCRIBE}'.")
    with http_worker.client() as client:
        answer = client.post(TRANSCRIBE, json={"file": BASE64})
    assert (answer.status_code, answer.json()["error"]) == (404, error)


# ---- Ends


def test_a_cancelled_job_ends_while_its_sound_is_fetched(queue: httpx.Client, links: Server) -> None:
    job = queue.post("run", json={"input": {"audio": f"{links.url}/drip"}}).json()
    while "/drip" not in links.hits:
        time.sleep(0.05)
    queue.post(f"cancel/{job['id']}")
    assert queue.get(f"status/{job['id']}").json()["status"] == "CANCELLED"
    assert text_of(queue, audio=BASE64) == TEXT


def test_a_job_ends_at_its_deadline(queue: httpx.Client, links: Server) -> None:
    error = result_of(queue, {"audio": f"{links.url}/drip"})
    assert (error["code"], error["type"]) == (504, "TimeoutError")
    assert f"REQUEST_TIMEOUT={REQUEST_SECONDS}" in error["message"]


# ---- Usage


def tokens_of_engine(http: httpx.Client) -> tuple[int, int]:
    """Return how many tokens the engine has read and generated so far."""
    samples = {
        sample.name: int(sample.value)
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    return samples["vllm:prompt_tokens_total"], samples["vllm:generation_tokens_total"]


def last_line(log: Path) -> Any:
    """Return the last line of the log about a job."""
    lines = [line for line in log.read_text().rpartition("\n")[0].splitlines() if '"input_tokens"' in line]
    return json.loads(lines[-1])


def test_the_log_has_the_tokens_of_the_engine(
    speech_worker: SpeechWorker, queue: httpx.Client, http: httpx.Client
) -> None:
    before = tokens_of_engine(http)
    assert text_of(queue, audio=base64.b64encode(speech.wav("1234567890*#", "en")).decode())
    after = tokens_of_engine(http)
    line = last_line(speech_worker.endpoint.log)
    assert (line["input_tokens"], line["output_tokens"]) == (after[0] - before[0], after[1] - before[1])
    assert line["modalities"] == {"text": 1, "audio": 2}, "vLLM cuts this sound into two chunks"

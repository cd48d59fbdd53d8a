"""The routes for speech give the same responses as `vllm serve`. Run by `make conformance`: it needs another engine."""

import base64
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.servers import vllm_serve
from tests.conformance import canonical
from tests.conftest import SpeechWorker
from tests.support import speech

pytestmark = pytest.mark.skipif("CONFORMANCE" not in os.environ, reason="run by make conformance")

TRANSCRIBE, TRANSLATE = "/v1/audio/transcriptions", "/v1/audio/translations"


@dataclass(frozen=True, slots=True)
class Case:
    """One request: a sound and the other fields of its form."""

    route: str = TRANSCRIBE
    fields: dict[str, Any] = field(default_factory=dict)
    sound: bytes = speech.wav("12 3")

    @property
    def json(self) -> dict[str, Any]:
        return {"model": "tiny", "file": base64.b64encode(self.sound).decode(), **self.fields}


CASES = [
    pytest.param(Case(), id="transcription"),
    pytest.param(Case(TRANSLATE), id="translation"),
    pytest.param(Case(fields={"language": "en"}), id="another language"),
    pytest.param(Case(fields={"prompt": "ONE TWO"}), id="a prompt"),
    pytest.param(Case(fields={"max_completion_tokens": 1}), id="a length"),
    pytest.param(Case(fields={"temperature": 0.5, "seed": 3}), id="sampling"),
    pytest.param(Case(fields={"response_format": "text"}), id="text"),
    pytest.param(Case(fields={"response_format": "verbose_json"}), id="segments"),
    pytest.param(Case(TRANSLATE, {"response_format": "verbose_json"}), id="translated segments"),
    pytest.param(Case(sound=speech.wav("1234567890*#")), id="a long sound"),
    pytest.param(
        Case(fields={"response_format": "verbose_json"}, sound=speech.wav("123 456 789 0")), id="long segments"
    ),
    pytest.param(Case(sound=speech.silence()), id="silence"),
    pytest.param(Case(sound=speech.encoded("123", "flac", rate=speech.RATE)), id="flac"),
    pytest.param(Case(fields={"stream": True}), id="a stream"),
    pytest.param(Case(TRANSLATE, {"stream": True, "stream_include_usage": True}), id="a translated stream with usage"),
    pytest.param(Case(fields={"stream": True}, sound=speech.wav("1234567890*#")), id="a long stream"),
]
WRONG = [
    pytest.param(Case(fields={"language": "xx"}), id="language"),
    pytest.param(Case(fields={"response_format": "srt"}), id="subtitles"),
    pytest.param(Case(fields={"response_format": "verbose_json", "stream": True}), id="a stream of segments"),
    pytest.param(Case(fields={"model": "gpt-9"}), id="model"),
    pytest.param(Case(fields={"temperature": "hot"}), id="temperature"),
]


@pytest.fixture(scope="module")
def reference() -> Iterator[httpx.Client]:
    """A client of vLLM's own server."""
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_serve(Path(folder) / "log", **speech.ENVIRONMENT) as server,
        httpx.Client(base_url=server.base_url.removesuffix("/v1"), timeout=60) as client,
    ):
        yield client


def answer_of(response: httpx.Response) -> Any:
    content_type = response.headers["content-type"]
    read = canonical.stream if content_type.startswith("text/event-stream") else canonical.body
    return response.status_code, content_type, read(response.content)


def uploaded(client: httpx.Client, case: Case) -> Any:
    data = {"model": "tiny", **{name: str(value) for name, value in case.fields.items()}}
    return answer_of(client.post(case.route, files={"file": ("speech.wav", case.sound)}, data=data))


@pytest.mark.parametrize("case", [*CASES, *WRONG])
def test_responses_are_those_of_vllm_serve(reference: httpx.Client, speech_worker: SpeechWorker, case: Case) -> None:
    expected = uploaded(reference, case)
    with speech_worker.client() as client:
        assert uploaded(client, case) == expected
        assert answer_of(client.post(case.route, json=case.json)) == expected


@pytest.mark.parametrize("case", CASES)
def test_job_outputs_are_those_of_vllm_serve(reference: httpx.Client, speech_worker: SpeechWorker, case: Case) -> None:
    _, _, expected = uploaded(reference, case)
    job_input = {"openai_route": case.route, "openai_input": case.json}
    job = httpx.post(f"{speech_worker.endpoint.url}/runsync", json={"input": job_input}, timeout=60).json()
    assert job["status"] == "COMPLETED"
    if case.fields.get("stream"):
        assert canonical.stream("".join(job["output"]).encode()) == expected
    else:
        assert [canonical.value(item) for item in job["output"]] == [expected]

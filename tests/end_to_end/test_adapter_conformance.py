"""Requests with LoRA adapters get the same responses as from `vllm serve`. Run by `make conformance`."""

import os
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.servers import vllm_serve
from tests.conformance import canonical
from tests.end_to_end.conftest import AdapterWorker
from tests.end_to_end.test_adapters import QUESTIONS, body_of, path_of
from tests.support import adapters

pytestmark = pytest.mark.skipif("CONFORMANCE" not in os.environ, reason="run by make conformance")


@pytest.fixture(scope="module")
def reference() -> Iterator[httpx.Client]:
    """A client of vLLM's own server, which loads an adapter at its start."""
    settings = {"ENABLE_LORA": "true", "LORA_MODULES": f"french={adapters.FOLDER}/french"}
    # As the worker sets it on CPUs: the responses have a fingerprint of the configuration.
    settings |= {"MAX_LORAS": "3", "MAX_CPU_LORAS": "3"}
    with (
        tempfile.TemporaryDirectory() as folder,
        vllm_serve(Path(folder) / "log", MAX_LORA_RANK=adapters.RANK, **settings) as server,
        httpx.Client(base_url=server.base_url.removesuffix("/v1"), timeout=60) as client,
    ):
        yield client


def answer(client: httpx.Client, model: str, question: str, stream: bool) -> Any:
    response = client.post(path_of(question), json=body_of(model, question, stream))
    data = response.content.replace(f'"model":"{model}"'.encode(), b'"model":"french"')
    return response.status_code, canonical.stream(data) if stream else canonical.body(data)


@pytest.mark.parametrize("model", ["french", "static-french", "my-org/french"])
@pytest.mark.parametrize(("question", "stream"), list(product(QUESTIONS, (False, True))))
def test_responses_are_those_of_vllm_serve(
    reference: httpx.Client, adapter_worker: AdapterWorker, model: str, question: str, stream: bool
) -> None:
    expected = answer(reference, "french", question, stream)
    assert expected[0] == 200
    with adapter_worker.client() as client:
        assert answer(client, model, question, stream) == expected

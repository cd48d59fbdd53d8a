"""Checks the grammar of a request with structured output before vLLM and the engine compile it.

A few bytes of regular expression, grammar or JSON schema can take minutes to compile, or seconds for each token. vLLM
compiles in threads, which nobody can end: one such request blocks all later ones with structured output, or all
requests. The worker therefore compiles and tries each new grammar in a process that is killed when its time is up.
"""

import asyncio
import hashlib
import json
import socket
import subprocess
import time
from collections import Counter, OrderedDict
from http import HTTPStatus
from tempfile import TemporaryFile
from typing import Any

import torch
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams, check_json_nesting
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.structured_output import backend_xgrammar
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar
from vllm.v1.structured_output.request import get_structured_output_key
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from worker import processes

MAX_BYTES = 256 << 10
"""The largest grammar, regular expression, list of choices or JSON schema, in bytes. vLLM parses it in the event loop,
which takes up to a second at this size."""
CHECK_CPU_SECONDS = 30
"""The CPU time for compiling and trying one grammar, of all its threads together. With 130,000 tokens a set of 128
tools takes 1 s, and each string with its own `maxLength` 3 s. Unlike time by the clock it does not depend on the
load."""
START_SECONDS = 120.0
"""The time until the checking process must have answered, its start included."""
HARMLESS_BYTES = 10_000
"""Lists of choices up to this size are always fast, and are not checked."""
MAX_CHECKS = 8
"""How many grammars are checked at the same time."""
PLACE_SECONDS = 20.0
"""How long a grammar waits until fewer are being checked."""
MAX_REMEMBERED = 1024
"""How many grammars that have passed are remembered, by their hash."""

TOO_SLOW = (
    "The structured output is too complex: compiling its grammar, or generating with it, takes too long or needs too "
    "much memory. Use fewer rules, alternatives and properties, smaller repetition counts and lengths, and no "
    "repetition with an upper bound inside another repetition."
)
BUSY = "The worker is checking the grammars of too many other requests. Try again in a minute."
UNCHECKED = b"unchecked"
"""The reply about a grammar that xgrammar does not accept. vLLM words the error, or uses another library."""
PASSED = b"passed"
FIRST_SECONDS, TOKEN_SECONDS = 2.0, 0.05
"""The CPU time that a grammar may use in the engine's loop: at first, and more for each generated token."""


def bound_steps() -> None:
    """Have the engine end requests whose grammar turns out to be slow. Call it before the engine process is forked."""
    setattr(backend_xgrammar, "XgrammarGrammar", BoundedGrammar)  # noqa: B010 - for mypy


class BoundedGrammar(XgrammarGrammar):
    """A grammar that rejects all tokens once it has used too much time: vLLM then ends its request with an error.

    Some ambiguous grammars are fast at first and need seconds for each token later. All other requests wait meanwhile.
    """

    used_seconds = 0.0

    def fill_bitmask(self, bitmask: torch.Tensor, idx: int) -> None:
        start = time.thread_time()
        super().fill_bitmask(bitmask, idx)
        self.used_seconds += time.thread_time() - start

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        start = time.thread_time()
        accepted: bool = super().accept_tokens(request_id, tokens)
        self.used_seconds += time.thread_time() - start
        return accepted and self.used_seconds <= FIRST_SECONDS + TOKEN_SECONDS * self.num_processed_tokens


class Grammars:
    """Checks grammars in child processes, and remembers those that have passed."""

    def __init__(self, client: AsyncLLM, cpu_seconds: int = CHECK_CPU_SECONDS) -> None:
        self._client = client
        self._cpu_seconds = cpu_seconds
        self._uses_xgrammar = client.vllm_config.structured_outputs_config.backend in ("auto", "xgrammar")
        self._checks: OrderedDict[str, asyncio.Task[None]] = OrderedDict()
        """The running checks and those that have passed, by the hash of the grammar; the last used are at the end."""
        self._waiters: Counter[asyncio.Task[None]] = Counter()
        """How many requests wait for each check."""
        self._places = asyncio.Semaphore(MAX_CHECKS)
        self._starting = asyncio.Lock()
        self._process: _Checker | None = None

    async def check(self, params: StructuredOutputsParams) -> None:
        """Return once the grammar has passed.

        Raises:
            VLLMValidationError: the grammar is too large, too deeply nested or too complex.
        """
        check_json_nesting(params.json)
        if params.json_object is False:
            # vLLM refuses it.
            return
        if params.choice and sum(len(str(choice)) for choice in params.choice) > MAX_BYTES:
            raise VLLMValidationError(
                f"The structured output's choices are too large. At most {MAX_BYTES} bytes are accepted: use fewer."
            )
        kind, source = _source(params)
        if (size := len(source.encode(errors="surrogatepass"))) > MAX_BYTES:
            raise VLLMValidationError(
                f"The structured output's {kind} has {size} bytes. At most {MAX_BYTES} bytes are accepted: use a "
                "smaller one."
            )
        if not self._uses_xgrammar or (kind == "choice" and size <= HARMLESS_BYTES):
            return
        key = hashlib.sha256(f"{kind} {source}".encode(errors="surrogatepass")).hexdigest()
        if key not in self._checks:
            self._checks[key] = asyncio.create_task(self._run(kind, source))
            self._checks[key].add_done_callback(lambda task: self._forget_failed(key, task))
        check = self._checks[key]
        self._checks.move_to_end(key)
        if len(self._checks) > MAX_REMEMBERED:
            self._checks.popitem(last=False)
        self._waiters[check] += 1
        try:
            # Others may wait for the same check when this request is cancelled.
            await asyncio.shield(check)
        finally:
            self._waiters[check] -= 1
            if not self._waiters[check]:
                del self._waiters[check]
                check.cancel()

    def _forget_failed(self, key: str, task: asyncio.Task[None]) -> None:
        if (task.cancelled() or task.exception()) and self._checks.get(key) is task:
            del self._checks[key]

    async def _run(self, kind: str, source: str) -> None:
        try:
            await asyncio.wait_for(self._places.acquire(), PLACE_SECONDS)
        except TimeoutError:
            raise GracefulHTTPError(BUSY, HTTPStatus.TOO_MANY_REQUESTS) from None
        try:
            checker = await self._checker()
            reply = await checker.check(kind, source)
        except TimeoutError:
            raise VLLMValidationError(TOO_SLOW) from None
        finally:
            self._places.release()
        if not reply and checker.popen.poll() is not None:
            raise RuntimeError("The process that checks grammars has ended")
        if reply not in (PASSED, UNCHECKED):
            raise VLLMValidationError(TOO_SLOW)

    async def _checker(self) -> "_Checker":
        async with self._starting:
            if self._process is None or self._process.popen.poll() is not None:
                self._process = await asyncio.to_thread(_Checker, self._client, self._cpu_seconds)
            return self._process

    def close(self) -> None:
        """End the checking process."""
        if self._process is not None:
            self._process.close()


class _Checker:
    """The process in which `grammar_checks` runs. It forks a process of its own for each check."""

    def __init__(self, client: AsyncLLM, cpu_seconds: int) -> None:
        self._control, theirs = socket.socketpair()
        with theirs, TemporaryFile() as arguments:
            arguments.write(json.dumps({"cpu_seconds": cpu_seconds, **_compiler_arguments(client)}).encode())
            arguments.seek(0)
            # The worker's own environment is not passed on: it contains secrets.
            self.popen = processes.start(
                "worker.grammar_checks",
                str(theirs.fileno()),
                environ={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
                stdin=arguments,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    async def check(self, kind: str, source: str) -> bytes:
        """Return the reply about one grammar; empty if its process was killed."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"c"], [theirs.fileno()])
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        try:
            async with asyncio.timeout(START_SECONDS):
                writer.write(json.dumps([kind, source]).encode())
                writer.write_eof()
                return await reader.read()
        finally:
            writer.close()

    def close(self) -> None:
        self._control.close()
        self.popen.kill()
        self.popen.wait()


def _source(params: StructuredOutputsParams) -> tuple[str, str]:
    """Return the kind of a grammar, as `grammar_checks` calls it, and its text."""
    if params.choice:
        return "choice", choice_as_grammar([str(choice) for choice in params.choice])
    option, source = get_structured_output_key(params)
    if option is StructuredOutputOptions.GRAMMAR:
        return "lark" if grammar_is_likely_lark(source) else "ebnf", source
    return option.name.lower(), source


def _compiler_arguments(client: AsyncLLM) -> dict[str, Any]:
    """Return what the engine's compiler depends on: the vocabulary, and whether JSON may have any white space."""
    backend = XgrammarBackend(
        client.vllm_config,
        tokenizer=client.get_tokenizer(),
        vocab_size=client.model_config.get_vocab_size(),
    )
    vocabulary = backend.compiler.compile_grammar('root ::= "a"').tokenizer_info
    return {"vocabulary": vocabulary.serialize_json(), "any_whitespace": not backend.disable_any_whitespace}

"""Grammars of structured output that are cheap to send and costly to use, and honest ones, with the real xgrammar."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import xgrammar
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from tests.support import tiny
from worker.engine.grammars import MAX_BYTES, BoundedGrammar, Grammars

CPU_SECONDS = 3
STRING = {"type": "string"}
ANY_NUMBER_OF_X = "".join(f"r{each} ::= r{each + 1} r{each + 1} | r{each + 1}\n" for each in range(30))

Check = Callable[..., None]


def client(backend: str = "auto") -> AsyncLLM:
    """Return the parts of vLLM's client that are needed to check grammars."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    model = SimpleNamespace(get_vocab_size=lambda: len(tokenizer), hf_config=SimpleNamespace(model_type="qwen3"))
    config = SimpleNamespace(
        structured_outputs_config=SimpleNamespace(backend=backend, disable_any_whitespace=False),
        model_config=model,
        speculative_config=None,
    )
    return cast("AsyncLLM", SimpleNamespace(vllm_config=config, model_config=model, get_tokenizer=lambda: tokenizer))


@pytest.fixture(scope="module")
def check() -> Iterator[Check]:
    """Check a grammar, in one process for all tests."""
    grammars = Grammars(client(), CPU_SECONDS)
    with asyncio.Runner() as runner:
        yield lambda **constraint: runner.run(grammars.check(StructuredOutputsParams(**constraint)))
        grammars.close()


def properties(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": values, "required": list(values), "additionalProperties": False}


def nested(depth: int) -> dict[str, Any]:
    return properties({"inner": nested(depth - 1)}) if depth else STRING


@pytest.mark.parametrize(
    "constraint",
    [
        pytest.param({"regex": "((a{1,1000}){1,1000}){1,1000}"}, id="a regex with three nested repetitions"),
        pytest.param(
            {"grammar": "root ::= r1{1,1000}\nr1 ::= r2{1,1000}\nr2 ::= [a-z]{1,1000}"},
            id="three rules that repeat each other",
        ),
        pytest.param({"grammar": f'root ::= r0\n{ANY_NUMBER_OF_X}r30 ::= "x"?'}, id="rules that double thirty times"),
        pytest.param({"grammar": "root ::= " + "[^x]* " * 3000}, id="thousands of overlapping repetitions"),
        pytest.param(
            {"json": {"type": "object", "properties": dict.fromkeys(map(str, range(8000)), STRING)}},
            id="thousands of optional properties",
        ),
        pytest.param(
            {
                "structural_tag": json.dumps(
                    {
                        "type": "structural_tag",
                        "format": {"type": "regex", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
                    }
                )
            },
            id="a regex in a structural tag",
        ),
    ],
)
def test_a_costly_grammar_is_refused(check: Check, constraint: dict[str, Any]) -> None:
    start = time.monotonic()
    with pytest.raises(VLLMValidationError, match="too complex"):
        check(**constraint)
    # Without the limit each takes minutes, or gigabytes.
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "constraint",
    [
        pytest.param({"choice": [f"choice {each}" for each in range(100_000)]}, id="100,000 choices"),
        pytest.param({"json": {"enum": list(range(100_000))}}, id="100,000 values"),
        pytest.param({"regex": "a" * (MAX_BYTES + 1)}, id="a long regex"),
        pytest.param({"grammar": "root ::= a\n" * MAX_BYTES}, id="a long grammar"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "guidance"])
def test_a_large_grammar_is_refused_with_the_limit(constraint: dict[str, Any], backend: str) -> None:
    with pytest.raises(VLLMValidationError, match=f"At most {MAX_BYTES} bytes are accepted"):
        asyncio.run(Grammars(client(backend)).check(StructuredOutputsParams(**constraint)))


@pytest.mark.parametrize(
    "constraint",
    [
        pytest.param({"json_object": True}, id="any JSON object"),
        pytest.param({"choice": ["yes", "no", 'a "quoted" one', "ünïcode"]}, id="four choices"),
        pytest.param({"choice": [f"choice {each}" for each in range(5_000)]}, id="5,000 choices"),
        pytest.param({"json": {"enum": [f"value {each}" for each in range(5_000)]}}, id="5,000 values"),
        pytest.param({"json": json.dumps(properties({"name": STRING}))}, id="a schema as text"),
        pytest.param({"json": nested(20)}, id="20 nested objects"),
        pytest.param({"json": {"type": "string", "maxLength": 100_000}}, id="a string of up to 100,000 characters"),
        pytest.param(
            {"json": {"type": "array", "items": {"type": "array", "items": STRING, "maxItems": 100}, "maxItems": 100}},
            id="an array of arrays with limits",
        ),
        pytest.param({"json": {"anyOf": [properties({f"key{each}": STRING}) for each in range(128)]}}, id="128 tools"),
        pytest.param(
            {"json": properties({f"p{each}": {**STRING, "enum": ["x" * 900]} for each in range(200)})},
            id="a schema of 200 kB",
        ),
        pytest.param({"regex": r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}"}, id="a regex for a time"),
        pytest.param({"regex": r"[\w.+-]{1,64}@[a-z\d.-]{1,255}\.[a-z]{2,10}"}, id="a regex for an e-mail address"),
        pytest.param({"grammar": 'root ::= term ("+" term)*\nterm ::= [0-9]+ | "(" root ")"'}, id="arithmetic"),
        pytest.param({"grammar": 'start: "yes" | "no"'}, id="a grammar in Lark's syntax"),
        pytest.param(
            {
                "structural_tag": json.dumps(
                    {
                        "structures": [{"begin": "<f>", "schema": properties({"a": STRING}), "end": "</f>"}],
                        "triggers": ["<f"],
                    }
                )
            },
            id="a structural tag in the old format",
        ),
        pytest.param({"grammar": "root ::= ("}, id="a wrong grammar, whose error vLLM words"),
        pytest.param({"json_object": False}, id="no JSON object, which vLLM refuses"),
        pytest.param({"choice": []}, id="no choices, which vLLM refuses"),
        pytest.param({"choice": ["\ud800"]}, id="a lone surrogate"),
        pytest.param({"structural_tag": "no JSON"}, id="a structural tag that is no JSON"),
    ],
)
def test_an_honest_grammar_passes(check: Check, constraint: dict[str, Any]) -> None:
    check(**constraint)


def test_a_deeply_nested_schema_is_refused(check: Check) -> None:
    with pytest.raises(VLLMValidationError, match="nested too deeply"):
        check(json=nested(900))


def test_a_grammar_is_checked_once_even_if_its_first_request_is_cancelled() -> None:
    async def run() -> float:
        grammars = Grammars(client(), CPU_SECONDS)
        params = StructuredOutputsParams(json=properties({"name": STRING}))
        first = asyncio.create_task(grammars.check(params))
        await asyncio.sleep(0)
        second = asyncio.create_task(grammars.check(params))
        await asyncio.sleep(0)
        first.cancel()
        await second
        grammars.close()
        start = time.monotonic()
        # The process has ended: this would start another one.
        await grammars.check(params)
        return time.monotonic() - start

    assert asyncio.run(run()) < 0.5


def test_an_honest_grammar_does_not_wait_for_a_costly_one() -> None:
    async def run() -> bool:
        grammars = Grammars(client(), 30)
        await grammars.check(StructuredOutputsParams(json_object=True))
        costly = asyncio.create_task(grammars.check(StructuredOutputsParams(grammar="root ::= " + "[^x]* " * 3000)))
        await grammars.check(StructuredOutputsParams(choice=["yes", "no"]))
        waited = costly.done()
        costly.cancel()
        grammars.close()
        return waited

    assert not asyncio.run(run())


@pytest.mark.parametrize(
    ("regex", "ends"),
    [pytest.param("[a-z]*", False, id="fast"), pytest.param("((a{1,99}){1,99}){1,99}", True, id="slow")],
)
def test_a_grammar_that_becomes_slow_while_it_generates_ends_its_request(regex: str, *, ends: bool) -> None:
    vocabulary = xgrammar.TokenizerInfo(["a", "</s>"], stop_token_ids=[1])
    compiled = xgrammar.GrammarCompiler(vocabulary).compile_regex(regex)
    grammar = BoundedGrammar(vocab_size=2, matcher=xgrammar.GrammarMatcher(compiled), ctx=compiled)
    mask = xgrammar.allocate_token_bitmask(1, 2)
    accepted: list[bool] = []
    while len(accepted) < 1000 and (not accepted or accepted[-1]):
        grammar.fill_bitmask(mask, 0)
        accepted.append(grammar.accept_tokens("request", [0]))
    assert isinstance(grammar, XgrammarGrammar)
    assert (not accepted[-1]) is ends

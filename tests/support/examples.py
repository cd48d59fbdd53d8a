"""Reads the examples of docs/inputs.md, and compares an answer of the page with a real one.

A fence `json request PATH` has the body that is posted to a path of the endpoint; without PATH it is `runsync`. A fence
`json answer` or `text answer` (server-sent events) has the response; `json answer stream` has what all calls of
`/stream/ID` return together. In a table with the heading `output[0]`, each row is an example.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

CUT = "…"
"""In an answer of the page: any text, or the rest of a list."""
VARYING = {"created", "delayTime", "executionTime", "bytes"}
"""The keys whose numbers vary."""


@dataclass(frozen=True, slots=True)
class Example:
    """A request and its answers, by the way in which they are read: "" for the response itself, or "stream"."""

    line: int
    path: str
    request: str
    answers: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The kind of model that answers: "chat", "embedding", "audio", "speech" or "adapters"."""
        if re.search(r'"route": "/v1/(embeddings|score|rerank)"', self.request):
            return "embedding"
        if re.search('"model": "(my-org/)?french"', self.request):
            return "adapters"
        has_sound, has_prompt = '"audio": "' in self.request, '"prompt": ' in self.request
        if '"/v1/audio/' in self.request or (has_sound and (not has_prompt or '"task": ' in self.request)):
            return "speech"
        return "audio" if has_sound or '"input_audio"' in self.request else "chat"


def read(page: str) -> list[Example]:
    """Return the examples of a page.

    Raises:
        ValueError: a JSON fence is neither a request nor the answer to one.
    """
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    return [*_fences(tokens), *_rows(tokens)]


def _fences(tokens: list[Token]) -> list[Example]:
    examples: list[Example] = []
    for token in tokens:
        line = token.map[0] + 1 if token.map else 0
        match token.info.split() if token.type == "fence" else []:
            case ["json", "request", *path]:
                examples.append(Example(line, "".join(path) or "runsync", token.content))
            case ["json" | "text" as form, "answer", *way] if examples:
                answer = events(token.content) if form == "text" else json.loads(token.content)
                examples[-1].answers["".join(way)] = answer
            case ["json", *_]:
                raise ValueError(f"line {line}: a JSON fence must be 'json request', or 'json answer' after a request")
    return examples


def _rows(tokens: list[Token]) -> Iterator[Example]:
    cells: list[Token] = []
    has_examples = False
    for token in tokens:
        match token.type:
            case "tr_open":
                cells = []
            case "inline":
                cells.append(token)
            case "thead_close":
                has_examples = [cell.content for cell in cells] == ["`input`", "`output[0]`"]
            case "table_close":
                has_examples = False
            case "tr_close" if has_examples:
                job_input, output = (cell.content.strip("`") for cell in cells)
                answer = {"status": "COMPLETED", "output": [json.loads(output)]}
                line = cells[0].map[0] + 1 if cells[0].map else 0
                yield Example(line, "runsync", f'{{"input": {job_input}}}', {"": answer})


def events(text: str) -> list[Any]:
    """Return the data of server-sent events."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in data]


def differences(shown: Any, real: Any, path: str = "answer") -> Iterator[str]:
    """Yield where a real answer lacks something of the answer on the page, or differs from it."""
    match shown, real:
        case dict(), dict():
            for key, value in shown.items():
                if key in VARYING and isinstance(real.get(key), int):
                    continue
                if key in real:
                    yield from differences(value, real[key], f"{path}.{key}")
                else:
                    yield f"{path}.{key} is missing"
        case list(), list():
            is_cut = shown[-1:] == [CUT]
            items = shown[:-1] if is_cut else shown
            if len(items) > len(real) or (not is_cut and len(items) < len(real)):
                yield f"{path} has {len(real)} items instead of {len(items)}"
            for index, (one, other) in enumerate(zip(items, real, strict=False)):
                yield from differences(one, other, f"{path}[{index}]")
        case str(), str():
            if not re.fullmatch(".*".join(map(re.escape, shown.split(CUT))), real, re.DOTALL):
                yield f"{path} is {real!r} instead of {shown!r}"
        case float(), float():
            """Numbers with a fraction depend on the machine."""
        case _:
            if type(shown) is not type(real) or shown != real:
                yield f"{path} is {real!r} instead of {shown!r}"


def whole(answer: Any) -> Any:
    """Return an answer with its stream, if it has one, in a form that does not depend on where chunks were cut."""
    match answer:
        case list():
            return _merged(answer)
        case {"stream": parts}:
            return answer | {"stream": _merged(chain.from_iterable(part["output"] for part in parts))}
        case {"output": [list(), *_] as batches}:
            return answer | {"output": _merged(chain.from_iterable(batches))}
        case _:
            return answer


def _merged(chunks: Iterable[Any]) -> list[Any]:
    """Return the first chunk, with all later text, finish reason and usage, and then what is not a chunk."""
    first, *rest = chunks
    others = []
    for chunk in rest:
        if "choices" not in chunk:
            others.append(chunk)
            continue
        for choice in chunk["choices"]:
            start = first["choices"][choice["index"]]
            start["delta"]["content"] += choice["delta"].get("content") or ""
            start["finish_reason"] = choice.get("finish_reason") or start.get("finish_reason")
        first |= {key: chunk[key] for key in ("usage",) if key in chunk}
    return [first, *others]

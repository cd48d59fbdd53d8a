"""The documents: links have targets, examples can be parsed, settings and quoted messages exist."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import vllm
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support.tiny import ROOT
from worker.engine.arguments import SERVER_FLAGS, make_parser
from worker.settings import Settings, flags, legacy
from worker.settings.reading import from_variables
from worker.settings.sources import Variables

FOREIGN = re.compile(r"(^|/)(\.|node_modules/)")
PAGES = sorted(
    path
    for pattern in ("*.md", "[!.]*/**/*.md")
    for path in ROOT.glob(pattern)
    if not FOREIGN.search(path.relative_to(ROOT).as_posix())
)
SETTINGS_HEADINGS = {"variable", "variables", "setting", "settings"}
"""The headings of the first column of a table about settings."""
MESSAGE_HEADINGS = {"message", "messages"}
OTHERS = {"PRESET", "VLLM_CONFIG_FILE", "VLLM_CACHE_ROOT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"}
"""Variables that are neither fields of `Settings` nor flags of vLLM, but may be in a table."""
VLLM = Path(vllm.__file__).parent
VLLM_MESSAGES = ("v1/core/kv_cache_utils.py", "v1/worker/utils.py", "renderers/online_renderer.py")
"""The modules of vLLM whose messages the documents quote."""
# The page, which the README links to, and its section.
TASKS = [
    pytest.param("docs/quickstart.md", "1-create-the-endpoint", id="deploy a queue endpoint"),
    pytest.param("docs/deploying.md", "pod", id="deploy a pod"),
    pytest.param("docs/troubleshooting.md", "gated-and-private-models", id="use a gated model"),
    pytest.param("docs/models.md", "models-that-need-more-than-a-name", id="serve an own LoRA adapter"),
    pytest.param("docs/troubleshooting.md", "out-of-memory", id="fix out of memory"),
    pytest.param("docs/troubleshooting.md", "slow-start", id="fix a slow start"),
    pytest.param("docs/troubleshooting.md", "wrong-tool-calls", id="fix wrong tool calls"),
    pytest.param("docs/migration.md", "variables", id="move from worker-vllm"),
    pytest.param("docs/operations.md", "metrics-and-alerts", id="watch metrics"),
    pytest.param("docs/upgrading.md", "a-new-version-of-the-worker", id="upgrade"),
]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def tokens(page: Path) -> list[Token]:
    """Return a page's tokens: blocks, and the tokens inside them."""
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    return [token for block in blocks for token in (block, *(block.children or ()))]


def text_of(token: Token) -> str:
    """Return a line's text without its markup."""
    return "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    slugs: list[str] = []
    for before, token in zip(tokens(page), tokens(page)[1:], strict=False):
        if before.type == "heading_open":
            slug = re.sub(r"[^\w\- ]", "", text_of(token).strip().lower()).replace(" ", "-")
            slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return set(slugs)


def links(page: Path) -> list[str]:
    linking = (token for token in tokens(page) if token.type in ("link_open", "image"))
    return [unquote(str(token.attrGet("href") or token.attrGet("src"))) for token in linking]


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Yield the examples in a language, each with its line number."""
    for token in tokens(page):
        if token.type == "fence" and token.info.split()[:1] == [language] and token.map:
            yield token.map[0] + 1, token.content


def code_in_first_columns(page: Path, headings: set[str]) -> Iterator[str]:
    """Yield the code in the first columns of tables whose first heading is one of `headings`."""
    column, in_head, is_chosen = 0, False, False
    for token in tokens(page):
        match token.type:
            case "thead_open" | "thead_close":
                in_head = token.type == "thead_open"
            case "tr_open":
                column = 0
            case "th_open" | "td_open":
                column += 1
            case "inline" if column == 1 and in_head:
                is_chosen = text_of(token).strip().lower() in headings
            case "inline" if column == 1 and is_chosen:
                yield from (child.content for child in token.children or () if child.type == "code_inline")
            case "table_close":
                column, is_chosen = 0, False


def variables(page: Path) -> set[str]:
    """Return the variables in tables about settings."""
    names = {code.partition("=")[0] for code in code_in_first_columns(page, SETTINGS_HEADINGS)}
    return {name for name in names if re.fullmatch("[A-Z][A-Z0-9_]*", name)}


def shortened(text: str) -> str:
    """Replace every value and every setting with its value by `…`."""
    text = re.sub(r"%[-.\d]*[a-z]", "…", " ".join(text.split()).replace("%%", "%"))
    return re.sub(r"[A-Z_…]*[A-Z_]{3,}='?…'?", "…", text)


def templates(source: str) -> Iterator[str]:
    """Yield every text in Python source, with `…` for what a f-string or the logger puts in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield shortened("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield shortened(node.value)


@cache
def all_messages() -> frozenset[str]:
    files = [*(ROOT / "worker").rglob("*.py"), *(VLLM / name for name in VLLM_MESSAGES)]
    return frozenset(template for file in files for template in templates(file.read_text()))


def is_quoted_from(message: str, template: str) -> bool:
    """Return whether the parts of a message between its `…` are in a template, in the same order."""
    parts = [part.strip(" .,:;'()") for part in shortened(message).split("…")]
    return re.search(".*".join(map(re.escape, filter(None, parts))), template) is not None


@cache
def known() -> set[str]:
    parser = make_parser()
    own = {name.upper() for name in Settings.model_fields}
    return own | flags.settable(parser, SERVER_FLAGS).keys() | legacy.aliases().keys() | OTHERS


def test_pages_are_found() -> None:
    assert {ROOT / "README.md", ROOT / "docs/quickstart.md"} <= set(PAGES)


@pages
def test_every_link_has_a_target(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


@pages
def test_every_json_example_is_json(page: Path) -> None:
    for line, text in blocks(page, "json"):
        # An example may show some fields of an object without its braces.
        is_part = text.lstrip().startswith('"') and ":" in text
        try:
            json.loads(f"{{{text}}}" if is_part else text)
        except ValueError as error:
            pytest.fail(f"line {line}: {error}")


@pages
def test_every_python_example_compiles(page: Path) -> None:
    for line, text in blocks(page, "python"):
        compile(text, f"{page.name}:{line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pages
def test_every_shell_example_is_valid(page: Path) -> None:
    for line, text in blocks(page, "sh"):
        process = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert process.returncode == 0, f"line {line}: {process.stderr}"


@pages
def test_every_yaml_example_is_yaml(page: Path) -> None:
    for _, text in blocks(page, "yaml"):
        list(yaml.safe_load_all(text))


@pages
def test_every_setting_in_a_table_exists(page: Path) -> None:
    assert variables(page) <= known()


@pages
def test_every_message_in_a_table_exists(page: Path) -> None:
    quoted = list(code_in_first_columns(page, MESSAGE_HEADINGS))
    assert {name for text in quoted for name in re.findall(r"([A-Z][A-Z_]+)=", text)} <= known()
    unknown = [text for text in quoted if not any(is_quoted_from(text, template) for template in all_messages())]
    assert not unknown


@pytest.mark.parametrize(
    ("message", "template"),
    [
        pytest.param("No route '…'. Available routes: …", "No route …. Available routes: ….", id="a value"),
        pytest.param("it takes longer than LIMIT_A=… s", "it takes longer than … s", id="a setting with its value"),
        pytest.param("Job … ends", shortened("Job %s ends without a result"), id="the beginning of a line of the log"),
    ],
)
def test_a_message_is_found_in_its_template(message: str, template: str) -> None:
    assert is_quoted_from(message, template)
    assert not is_quoted_from(message, "The worker has no connection left. Try again in a few seconds.")


def test_the_table_of_modes_is_that_of_the_settings() -> None:
    section = (ROOT / "docs/deploying.md").read_text().partition("## How the worker chooses its mode")[2]
    rows = re.findall(
        r"^\| (.*?) \| `(\w+)`.*? \| (.*?) \| `(.*?)` \|$", section.partition("## Image")[0], re.MULTILINE
    )
    assert len(rows) == 6
    for condition, mode, port, volume in rows:
        names = re.findall(r"`([A-Z_]+)` is set", condition)
        settings = from_variables(Variables(dict.fromkeys(names, "8123"), {}))
        expected = tuple(map(int, re.findall(r"\d+", port))) or ((8123,) if port == "`PORT`" else ())
        assert (settings.mode, settings.ports, str(settings.volume)) == (mode, expected, volume), condition


@pytest.mark.parametrize(("page", "anchor"), TASKS)
def test_a_task_is_found_within_two_clicks_of_the_readme(page: str, anchor: str) -> None:
    assert page in {link.partition("#")[0] for link in links(ROOT / "README.md")}
    assert anchor in anchors(ROOT / page)


def test_the_documents_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
    assert len((ROOT / "docs/operations.md").read_text().splitlines()) <= 300

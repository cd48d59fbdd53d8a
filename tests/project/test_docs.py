"""The documents: links have targets, examples can be parsed, and settings exist."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from vllm.entrypoints.launchers.cli_args import make_arg_parser

from tests.support.tiny import ROOT
from worker.engine.arguments import SERVER_FLAGS, _Parser
from worker.settings import Settings, flags, legacy

FOREIGN = re.compile(r"(^|/)(\.|node_modules/)")
PAGES = sorted(
    path
    for pattern in ("*.md", "[!.]*/**/*.md")
    for path in ROOT.glob(pattern)
    if not FOREIGN.search(path.relative_to(ROOT).as_posix())
)
SETTINGS_HEADINGS = {"variable", "variables", "setting", "settings"}
"""The headings of the first column of a table about settings."""
OTHERS = {"PRESET", "VLLM_CONFIG_FILE", "VLLM_CACHE_ROOT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"}
"""Variables that are neither fields of `Settings` nor flags of vLLM, but may be in a table."""

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


def variables(page: Path) -> Iterator[str]:
    """Yield the variables in the first columns of tables about settings."""
    column, in_head, is_about_settings = 0, False, False
    for token in tokens(page):
        match token.type:
            case "thead_open" | "thead_close":
                in_head = token.type == "thead_open"
            case "tr_open":
                column = 0
            case "th_open" | "td_open":
                column += 1
            case "inline" if column == 1 and in_head:
                is_about_settings = text_of(token).strip().lower() in SETTINGS_HEADINGS
            case "inline" if column == 1 and is_about_settings:
                words = (child.content for child in token.children or () if child.type == "code_inline")
                yield from (name for word in words if re.fullmatch("[A-Z][A-Z0-9_]*", name := word.partition("=")[0]))
            case "table_close":
                column, is_about_settings = 0, False


@cache
def known() -> set[str]:
    parser = make_arg_parser(_Parser())  # type: ignore[no-untyped-call]
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
    assert set(variables(page)) <= known()

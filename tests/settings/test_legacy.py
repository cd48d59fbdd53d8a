"""Every variable of worker-vllm has the effect that worker_vllm.yaml states, or a warning says that it has none."""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import vllm.config
import vllm.envs
import yaml
from pydantic.fields import FieldInfo
from vllm.config.parallel import EPLBConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.config.structured_outputs import StructuredOutputsConfig

from tests.support.tiny import MODEL, ROOT
from worker.engine import parse_arguments, remarks
from worker.engine.arguments import LOG_FLAGS, SERVER_FLAGS, make_parser
from worker.errors import ConfigurationError
from worker.settings import Settings, flags, legacy, reading
from worker.settings.sources import collect

TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("worker_vllm.yaml").read_text())
CLASSES = ("same", "libraries", "alias", "translated", "without_effect")
OWN = {name.upper() for name in Settings.model_fields} | {"VLLM_CONFIG_FILE", "PRESET"}
NO_SETTINGS = {"help", "model_tag", "config", "headless", "grpc"}
"""Flags of vLLM that start another program, print something, or have too common a name for a variable."""


@cache
def parser() -> argparse.ArgumentParser:
    return make_parser()


@cache
def settable() -> Mapping[str, argparse.Action]:
    return flags.settable(parser(), SERVER_FLAGS)


def read(environ: Mapping[str, str]) -> Settings:
    return reading.read({"MODEL_NAME": str(MODEL), **environ})


def warnings(names: Iterable[str], value: str = "true") -> list[str]:
    """Return all warnings about variables, as `--check` prints them."""
    of_vllm = reading.defaults(collect(dict.fromkeys(names, value)))
    return [*of_vllm.variables.warnings, *remarks(of_vllm)]


def test_every_name_is_in_one_class() -> None:
    names = [name for each in CLASSES for name in TABLE[each]]
    assert len(names) == len(set(names)) >= 219
    defaults = {name for environ in TABLE["defaults"].values() for name in environ}
    assert defaults <= set(names)


@pytest.mark.parametrize("name", TABLE["same"])
def test_a_name_that_stays_is_a_setting(name: str) -> None:
    assert name in OWN | settable().keys()
    assert [line for line in warnings({name} - {"VLLM_CONFIG_FILE"}) if "TRUST_REMOTE_CODE" not in line] == []


def test_libraries_read_their_variables_themselves() -> None:
    assert [name for name in TABLE["libraries"] if name not in vllm.envs.environment_variables] == [
        "PYTORCH_ALLOC_CONF"
    ]
    assert not warnings(TABLE["libraries"])


@pytest.mark.parametrize(("alias", "name"), TABLE["alias"].items())
def test_an_alias_sets_the_setting(alias: str, name: str) -> None:
    assert collect({alias: "x"}).values[name] == "x"
    assert name in OWN | settable().keys()
    assert not warnings([alias])
    both = collect({alias: "x", name: "y"})
    assert both.values[name] == "y"
    assert f"{alias} has no effect: {name} is set." in both.warnings


@pytest.mark.parametrize(("name", "change"), TABLE["translated"].items())
def test_an_old_setting_is_translated(name: str, change: dict[str, dict[str, Any]]) -> None:
    variables = collect(change["old"])
    for new, value in change["new"].items():
        assert new in OWN | settable().keys()
        text = variables.values[new]
        assert (json.loads(text) if isinstance(value, dict) else text) == value
    assert any(name in warning and "The worker uses" in warning for warning in variables.warnings)


@pytest.mark.parametrize("name", TABLE["without_effect"])
def test_a_setting_without_effect_causes_a_warning(name: str) -> None:
    (warning,) = warnings([name])
    assert re.match(f"{name} has no effect: .", warning)


def test_every_reason_names_existing_settings() -> None:
    known = OWN | settable().keys() | {"JSON", "RUNPOD_INIT_TIMEOUT"}
    fields = {
        "SPEC_DECODING_ACCEPTANCE_METHOD": SpeculativeConfig,
        "EPLB_WINDOW_SIZE": EPLBConfig,
        "EPLB_STEP_INTERVAL": EPLBConfig,
        "NUM_REDUNDANT_EXPERTS": EPLBConfig,
        "EPLB_LOG_BALANCEDNESS": EPLBConfig,
        "GUIDED_DECODING_BACKEND": StructuredOutputsConfig,
        "GUIDED_DECODING_DISABLE_ANY_WHITESPACE": StructuredOutputsConfig,
        "GUIDED_DECODING_DISABLE_ADDITIONAL_PROPERTIES": StructuredOutputsConfig,
    }
    for name, reason in legacy.without_effect().items():
        assert set(re.findall(r"\b[A-Z][A-Z0-9_]{3,}\b", reason)) <= known, name
        if name in fields:
            (field,) = re.findall('"([a-z_]+)"', reason)
            assert field in fields[name].__pydantic_fields__, name  # type: ignore[attr-defined]


def test_no_flag_of_vllm_is_silently_without_effect() -> None:
    """Each is a variable, or a warning says that it is none."""
    reported = {
        *legacy.aliases(),
        *legacy.without_effect(),
        *legacy.TRANSLATED,
        *map(str.upper, (*SERVER_FLAGS, *LOG_FLAGS)),
    }
    silent = {action.dest for action in parser()._actions if action.dest.upper() not in {*OWN, *settable(), *reported}}
    assert silent == NO_SETTINGS
    server = {name.upper() for name in SERVER_FLAGS} - OWN - legacy.aliases().keys()
    assert {warning.split(" ")[0] for warning in warnings(server)} == server


@pytest.mark.parametrize("environ", TABLE["defaults"].values(), ids=TABLE["defaults"])
def test_the_defaults_of_worker_vllm_are_accepted(environ: dict[str, str]) -> None:
    chosen = read(environ)
    args = vars(parse_arguments(chosen))
    for name, value in environ.items():
        if name not in settable() or name in ("LIMIT_MM_PER_PROMPT", "SERVED_MODEL_NAME"):
            continue
        words = [] if legacy.is_unset(name, value) else flags._flags(settable()[name], value)
        assert args[name.lower()] == vars(parser().parse_args(words))[name.lower()], name
    assert not [warning for warning in chosen.variables.warnings if "The worker uses" in warning]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in TABLE["options"].items() for value in values]
)
def test_the_options_of_worker_vllms_forms_are_accepted(name: str, value: str) -> None:
    parse_arguments(read({name: value}))


@pytest.mark.parametrize(("name", "values"), TABLE["removed_options"].items())
def test_options_that_vllm_has_removed_are_refused(name: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(ConfigurationError, match=f"{name}='{value}'"):
            parse_arguments(read({name: value}))


def is_positive(field: object) -> bool:
    """Tell whether a field of a class must be above 0."""
    bounds = field.metadata if isinstance(field, FieldInfo) else []
    return any((getattr(bound, "ge", None) or 0) > 0 or getattr(bound, "gt", -1) in (0, 0.0) for bound in bounds)


def field_of(action: argparse.Action, group: str) -> object:
    """Return a flag's field in vLLM's class of this name."""
    return getattr(getattr(vllm.config, group, None), "__pydantic_fields__", {}).get(action.dest)


def test_a_zero_counts_as_unset_where_it_has_no_meaning() -> None:
    groups = {id(action): str(group.title) for group in parser()._action_groups for action in group._group_actions}
    of_vllm = {name for name, action in settable().items() if is_positive(field_of(action, groups[id(action)]))}
    own = {name.upper() for name, field in Settings.model_fields.items() if is_positive(field)}
    assert min(len(of_vllm), len(own)) > 20
    positive = of_vllm | own
    lines = (ROOT / "worker/settings/legacy.yaml").read_text().partition("zero_is_unset:\n")[2].partition("\n\n")[0]
    listed = dict(re.findall(r"^- (\w+)(.*)$", lines, re.MULTILINE))
    assert positive <= listed.keys()
    assert {name for name, comment in listed.items() if not comment} == positive
    assert listed.keys() <= settable().keys() | OWN | legacy.SPECULATIVE.keys()
    for name in listed:
        assert name not in collect({name: "0", "PRESET": "none"}).values
        assert name not in collect({name: "0.0", "PRESET": "none"}).values


@pytest.mark.parametrize("name", ["SEED", "MAX_LOGPROBS", "MM_PROCESSOR_CACHE_GB", "CPU_OFFLOAD_GB", "IMAGE_LIMIT"])
def test_a_zero_that_means_something_is_kept(name: str) -> None:
    assert collect({name: "0"}).values[name] == "0"


@pytest.mark.parametrize("value", ["", " ", "None"])
def test_values_of_empty_fields_count_as_unset(value: str) -> None:
    assert collect({"MODEL_NAME": "org/m", "QUANTIZATION": value, "TASK": value}) == collect({"MODEL_NAME": "org/m"})


def test_a_file_may_contain_zeros_too(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max-num-batched-tokens: 0\nseed: 0\n")
    values = collect({"VLLM_CONFIG_FILE": str(file), "PRESET": "none"}).values
    assert "MAX_NUM_BATCHED_TOKENS" not in values
    assert values["SEED"] == "0"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param({"NGRAM_PROMPT_LOOKUP_MAX": "4"}, {"method": "ngram", "prompt_lookup_max": 4}, id="n-grams"),
        pytest.param(
            {"SPECULATIVE_METHOD": "ngram", "NUM_SPECULATIVE_TOKENS": "5", "NGRAM_PROMPT_LOOKUP_MIN": "0"},
            {"method": "ngram", "num_speculative_tokens": 5},
            id="method, tokens, and an empty field",
        ),
        pytest.param(
            {"SPECULATIVE_MODEL": "org/draft", "NUM_SPECULATIVE_TOKENS": "3"},
            {"model": "org/draft", "num_speculative_tokens": 3},
            id="a model, whose method vLLM detects",
        ),
    ],
)
def test_settings_for_speculative_decoding_become_one(old: dict[str, str], new: dict[str, Any]) -> None:
    chosen = read(old)
    assert json.loads(chosen.variables.values["SPECULATIVE_CONFIG"]) == new
    assert parse_arguments(chosen).speculative_config == new
    assert new.keys() <= SpeculativeConfig.__pydantic_fields__.keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        pytest.param({"NUM_SPECULATIVE_TOKENS": "5"}, "are not set", id="nothing to speculate with"),
        pytest.param(
            {"SPECULATIVE_METHOD": "ngram", "SPECULATIVE_CONFIG": '{"method": "eagle"}'},
            "SPECULATIVE_CONFIG is set",
            id="the new setting wins",
        ),
    ],
)
def test_settings_for_speculative_decoding_that_do_not_count(environ: dict[str, str], reason: str) -> None:
    variables = collect(environ)
    assert variables.values.get("SPECULATIVE_CONFIG") == environ.get("SPECULATIVE_CONFIG")
    (warning,) = variables.warnings
    assert "has no effect" in warning
    assert reason in warning


def test_a_preset_does_not_limit_batches_without_chunked_prefill() -> None:
    """The older form turns chunked prefill off, and then vLLM refuses batches that are shorter than the context."""
    preset = {"PRESET": "qwen2-vl-7b"}
    assert "MAX_NUM_BATCHED_TOKENS" in collect(preset).values
    assert "MAX_NUM_BATCHED_TOKENS" not in collect({**preset, "ENABLE_CHUNKED_PREFILL": "false"}).values
    limited = {**preset, "ENABLE_CHUNKED_PREFILL": "false", "MAX_NUM_BATCHED_TOKENS": "99"}
    assert collect(limited).values["MAX_NUM_BATCHED_TOKENS"] == "99"


# ---- docs/migration.md


def column(heading: str, number: int = 0) -> list[str]:
    """Return the cells of a column of the page's first table after a text."""
    text = (ROOT / "docs/migration.md").read_text()
    assert heading in text
    rows = text.partition(heading)[2].partition("\n| ")[2].partition("\n\n")[0].splitlines()[2:]
    return [row.strip("| ").split(" | ")[number] for row in rows]


def names(cells: Iterable[str]) -> list[str]:
    return [name for cell in cells for name in re.findall("`([A-Z][A-Z0-9_]*)", cell)]


def test_the_page_lists_the_aliases() -> None:
    heading = "These names are aliases."
    pairs = zip(column(heading), column(heading, 1), strict=True)
    listed = {alias: names([name])[0] for aliases, name in pairs for alias in names([aliases])}
    assert listed == dict(legacy.aliases())


def test_the_page_lists_the_translated_settings() -> None:
    listed = set(names(column("The worker translates these settings")))
    assert listed - {"LIMIT_MM_PER_PROMPT"} == legacy.TRANSLATED.keys() - {"ON_ENGINE_DEATH"}


def test_the_page_lists_the_settings_without_effect() -> None:
    listed = names(column("These names have no effect."))
    reported = {*legacy.without_effect(), *map(str.upper, (*SERVER_FLAGS, *LOG_FLAGS))}
    assert len(listed) == len(set(listed))
    assert set(TABLE["without_effect"]) <= set(listed) <= reported

"""`handler.py --check`, run as a command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import ROOT


def check(*options: str, **environ: str) -> tuple[int, str]:
    command = [sys.executable, "handler.py", "--check", *options]
    base = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=base | environ, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("settings") / "config.yaml"
    file.write_text("max-num-seqs: 7\n")
    variables = {"MAX_MODEL_LENGTH": "3", "GPU_MEMORY_UTIL": "0.3", "HF_TOKEN": "s3cret", "WORKER_API_KEY": "s3cret"}
    code, text = check("--json", VLLM_CONFIG_FILE=str(file), VLLM_EXTRA_ARGS="--hf-token s3cret --seed 3", **variables)
    assert code == 0
    assert "s3cret" not in text
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_every_value_has_its_source(report: dict[str, Any]) -> None:
    rows = {row["setting"]: (row["value"], row["source"]) for row in report["settings"]}
    assert rows["MODEL_NAME"] == ("Qwen/Qwen2-VL-7B-Instruct", "default")
    assert rows["GPU_MEMORY_UTILIZATION"] == (0.3, "GPU_MEMORY_UTIL")
    assert rows["MAX_NUM_SEQS"] == (7, "config.yaml")
    assert rows["MAX_MODEL_LEN"] == (32768, "preset qwen2-vl-7b")
    assert rows["LIMIT_MM_PER_PROMPT"] == ({"image": 5, "video": 1}, "derived")
    assert rows["HF_TOKEN"] == ("***", "environment")


def test_the_command_is_vllms_own(report: dict[str, Any]) -> None:
    assert report["command"].startswith("vllm serve Qwen/Qwen2-VL-7B-Instruct ")
    assert "--max-num-seqs 7" in report["command"]


def test_a_misspelt_name_causes_a_warning(report: dict[str, Any]) -> None:
    assert report["warnings"] == ["MAX_MODEL_LENGTH is not a setting. Did you mean MAX_MODEL_LEN?"]


def test_all_mistakes_are_reported_at_once() -> None:
    code, text = check(MAX_MODEL_LEN="long", DTYPE="bf17")
    assert (code, len(text.splitlines())) == (2, 2)
    code, text = check("--json", MAX_CONCURRENCY="0", PORT="x", DTYPE="bf17")
    assert (code, [line.split("=")[0] for line in json.loads(text)["mistakes"]]) == (
        2,
        ["MAX_CONCURRENCY", "PORT", "DTYPE"],
    )


def test_mistakes_that_do_not_need_vllm_are_reported_before_it_is_imported(tmp_path: Path) -> None:
    """The worker's own settings, the configuration file and the preset."""
    file = tmp_path / "config.yaml"
    file.write_text("[")
    program = (
        "import sys; sys.meta_path.insert(0, type('', (), {'find_spec': lambda name, *_: sys.exit(7) if name == 'vllm' "
        "else None})); from worker import check; check.run({'%s': '%s'}, False)"
    )
    for name, value, code in (("PORT", "x", 7), ("VLLM_CONFIG_FILE", str(file), 0), ("PRESET", "nope", 0)):
        done = subprocess.run(
            [sys.executable, "-c", program % (name, value)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.split("=")[0]) == (code, name)


def test_flags_of_vllms_own_server_cause_a_warning() -> None:
    code, text = check("--json", VLLM_EXTRA_ARGS="--api-key s3cret --host=0.0.0.0", MODEL_NAME="tests/models/tiny-vlm")
    assert code == 0
    assert [line.split(" ")[0] for line in json.loads(text)["warnings"]] == ["api_key", "host"]
    assert "s3cret" not in text

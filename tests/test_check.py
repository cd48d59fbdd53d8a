"""`handler.py --check`, as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import ROOT


def check(*options: str, **environ: str) -> tuple[int, str]:
    command = [sys.executable, "handler.py", "--check", *options]
    base = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=base | environ, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("settings") / "config.yaml"
    file.write_text("max-num-seqs: 7\n")
    said = {"MAX_MODEL_LENGTH": "3", "GPU_MEMORY_UTIL": "0.3", "HF_TOKEN": "s3cret", "WORKER_API_KEY": "s3cret"}
    code, text = check("--json", VLLM_CONFIG_FILE=str(file), VLLM_EXTRA_ARGS="--hf-token s3cret --seed 3", **said)
    assert code == 0
    assert "s3cret" not in text
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_every_value_has_its_source(told: dict[str, Any]) -> None:
    rows = {row["setting"]: (row["value"], row["source"]) for row in told["settings"]}
    assert rows["MODEL_NAME"] == ("Qwen/Qwen2-VL-7B-Instruct", "default")
    assert rows["GPU_MEMORY_UTILIZATION"] == (0.3, "GPU_MEMORY_UTIL")
    assert rows["MAX_NUM_SEQS"] == (7, "config.yaml")
    assert rows["MAX_MODEL_LEN"] == (32768, "preset qwen2-vl-7b")
    assert rows["LIMIT_MM_PER_PROMPT"] == ({"image": 5, "video": 1}, "derived")
    assert rows["HF_TOKEN"] == ("***", "environment")


def test_the_command_is_vllms_own(told: dict[str, Any]) -> None:
    assert told["command"].startswith("vllm serve Qwen/Qwen2-VL-7B-Instruct ")
    assert "--max-num-seqs 7" in told["command"]


def test_a_misspelt_name_is_told(told: dict[str, Any]) -> None:
    assert told["warnings"] == ["MAX_MODEL_LENGTH is no setting. Is MAX_MODEL_LEN meant?"]


def test_mistakes_are_told_all_at_once() -> None:
    code, text = check(MAX_MODEL_LEN="long", DTYPE="bf17")
    assert (code, len(text.splitlines())) == (2, 2)
    code, text = check("--json", MAX_CONCURRENCY="0", PORT="x")
    assert (code, len(json.loads(text)["mistakes"])) == (2, 2)


def test_what_needs_no_vllm_does_not_import_it(tmp_path: Path) -> None:
    """A mistake in the worker's own settings, or in the file, is told without it."""
    file = tmp_path / "config.yaml"
    file.write_text("[")
    program = "import sys; from worker import check; check.run({'%s': '%s'}, False); print('vllm' in sys.modules)"
    for name, value in (("PORT", "x"), ("VLLM_CONFIG_FILE", str(file)), ("PRESET", "nope")):
        done = subprocess.run(
            [sys.executable, "-c", program % (name, value)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "False"

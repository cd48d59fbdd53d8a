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
    assert report["warnings"] == [
        "MODEL_NAME is not set. The worker loads Qwen/Qwen2-VL-7B-Instruct.",
        "MAX_MODEL_LENGTH is not a setting. Did you mean MAX_MODEL_LEN?",
    ]


def test_all_mistakes_are_reported_at_once() -> None:
    code, text = check(MODEL_NAME="org/model", MAX_MODEL_LEN="long", DTYPE="bf17")
    assert (code, len(text.splitlines())) == (2, 2)
    code, text = check("--json", MAX_CONCURRENCY="-1", PORT="x", DTYPE="bf17")
    assert (code, [line.split("=")[0] for line in json.loads(text)["mistakes"]]) == (
        2,
        ["MAX_CONCURRENCY", "PORT", "DTYPE"],
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("PORT", "x", id="a setting of the worker"),
        pytest.param("DTYPE", "bf17", id="a flag of vLLM"),
        pytest.param("VLLM_CONFIG_FILE", "/no/such/file", id="a file that cannot be read"),
        pytest.param("PRESET", "nope", id="no such preset"),
    ],
)
def test_warnings_are_printed_beside_mistakes(name: str, value: str) -> None:
    others = {"MAX_MODEL_LENGTH": "3", "SWAP_SPACE": "4", "MODEL_NAME": "tests/models/tiny-vlm"}
    code, text = check("--json", **others, **{name: value})
    report = json.loads(text)
    assert (code, report["ok"]) == (2, False)
    assert [line.partition("=")[0] for line in report["mistakes"]] == [name]
    assert [line.partition(" ")[0] for line in report["warnings"]] == ["SWAP_SPACE", "MAX_MODEL_LENGTH"]
    if name == "PORT":
        code, text = check(**others, PORT=value)
        assert text.splitlines()[0].startswith("PORT='x'")
        assert "\nWarning: MAX_MODEL_LENGTH is not a setting. Did you mean MAX_MODEL_LEN?\n" in text


def test_the_other_mistakes_are_reported_if_a_source_cannot_be_read() -> None:
    _, text = check("--json", PRESET="nope", PORT="x", DTYPE="bf17", MODEL_NAME="tests/models/tiny-vlm")
    assert [line.split("=")[0] for line in json.loads(text)["mistakes"]] == ["PRESET", "PORT", "DTYPE"]


def test_mistakes_that_do_not_need_vllm_are_reported_before_it_is_imported(tmp_path: Path) -> None:
    """The worker's own settings, the configuration file and the preset."""
    file = tmp_path / "config.yaml"
    file.write_text("[")
    program = (
        "import sys; sys.meta_path.insert(0, type('', (), {'find_spec': lambda name, *_: sys.exit(7) if name == 'vllm' "
        "else None})); from worker import check; check.run({'%s': '%s'}, False)"
    )
    for name, value in (("PORT", "x"), ("VLLM_CONFIG_FILE", str(file)), ("PRESET", "nope")):
        done = subprocess.run(
            [sys.executable, "-c", program % (name, value)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.split("=")[0]) == (7, name)


def test_flags_of_vllms_own_server_cause_a_warning() -> None:
    code, text = check("--json", VLLM_EXTRA_ARGS="--api-key s3cret --host=0.0.0.0", MODEL_NAME="tests/models/tiny-vlm")
    assert code == 0
    assert [line.split(" ")[0] for line in json.loads(text)["warnings"]] == ["api_key", "host"]
    assert "s3cret" not in text


def test_flags_of_the_server_in_the_environment_cause_a_warning_and_the_workers_own_do_not() -> None:
    variables = {
        "SSL_KEYFILE": "/key",
        "UVICORN_LOG_LEVEL": "debug",
        "MIDDLEWARE": "a.b",
        "ENABLE_SSL_REFRESH": "false",
    }
    own = {"HOST": "0.0.0.0", "PORT": "8000", "ALLOWED_ORIGINS": '["*"]', "API_KEY": "s3cret"}
    code, text = check("--json", MODEL_NAME="tests/models/tiny-vlm", **variables, **own)
    assert code == 0
    reported = [line.split(" ")[0] for line in json.loads(text)["warnings"]]
    assert reported == ["MIDDLEWARE", "SSL_KEYFILE", "UVICORN_LOG_LEVEL"]


def test_the_mode_the_port_and_the_volume_are_those_that_the_worker_would_use() -> None:
    code, text = check("--json", MODEL_NAME="tests/models/tiny-vlm", RUNPOD_POD_ID="p", WORKER_API_KEY="k")
    assert code == 0
    rows = {row["setting"]: (row["value"], row["source"]) for row in json.loads(text)["settings"]}
    assert rows["WORKER_MODE"] == ("http", "derived")
    assert rows["PORT"] == (8000, "derived")
    assert rows["BASE_PATH"] == ("/workspace", "derived")


CLUSTER = {"NUM_NODES": "2", "NODE_RANK": "1", "PRIMARY_ADDR": "127.0.0.1", "MODEL_NAME": "tests/models/tiny-vlm"}


def test_the_role_in_a_cluster_and_the_plan() -> None:
    code, text = check("--json", **CLUSTER, TENSOR_PARALLEL_SIZE="2", CLUSTER_KEY="s3cret")
    assert code == 0
    assert "s3cret" not in text
    report = json.loads(text)
    rows = {row["setting"]: row["value"] for row in report["settings"]}
    assert {name: value for name, value in rows.items() if name.startswith("CLUSTER_")} == {
        "CLUSTER_PORT": 29560,
        "CLUSTER_TIMEOUT": 600.0,
        "CLUSTER_KEY": "***",
        "CLUSTER_ROLE": "follower",
        "CLUSTER_NODE": "node 1 of 2",
        "CLUSTER_HEAD": "127.0.0.1",
        "CLUSTER_INTERFACE": "lo (127.0.0.1)",
        "CLUSTER_RANKS": "process 1 of 2, counted from 0",
        "CLUSTER_PLAN": "1 copy of the model on 2 nodes without GPUs, each layer divided among 2 processes.",
    }
    assert report["warnings"] == []


def test_mistakes_of_a_cluster_are_reported_once() -> None:
    """vLLM's parser has no other words for the same mistake, and does not check what the nodes decide."""
    code, text = check("--json", **CLUSTER, NNODES="two", MAX_NUM_SEQS="x")
    assert (code, [line.split("=")[0] for line in json.loads(text)["mistakes"]]) == (2, ["NNODES", "MAX_NUM_SEQS"])
    code, text = check("--json", **{**CLUSTER, "PRIMARY_ADDR": "203.0.113.6", "NODE_ADDR": "203.0.113.7"})
    (mistake,) = json.loads(text)["mistakes"]
    assert code == 2
    assert mistake.startswith("No network interface of this machine has the node's address '203.0.113.7'.")


def test_an_unknown_option_is_named() -> None:
    command = [sys.executable, "handler.py", "--chek", "--rp_log_level", "DEBUG", "--check"]
    environ = {"PATH": "/usr/bin:/bin", "PORT": "x"}
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("Unknown options are ignored: --chek. ")
    assert "--rp" not in done.stderr.splitlines()[0]


WITHOUT_GPU = """
import sys
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform
vllm.platforms._current_platform = UnspecifiedPlatform()
from worker.main import main
sys.argv[1:] = ["--check"]
sys.exit(main())
"""


def test_the_image_for_gpus_says_that_it_sees_none() -> None:
    environ = {"PATH": "/usr/bin:/bin", "MODEL_NAME": "tests/models/tiny-vlm"}
    command = [sys.executable, "-c", WITHOUT_GPU]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vLLM sees no GPU. ")

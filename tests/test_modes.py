"""Modes without an engine: which one is chosen, the steps of `run`, and when a worker stops refusing jobs."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.clock import run_on_virtual_clock
from tests.support.tiny import ROOT
from worker import batch_mode, modes
from worker.cluster.cluster import FINISHED, SingleMachine
from worker.cluster.roster import STOPPED
from worker.errors import ConfigurationError, StartupError
from worker.main import choose, read_options
from worker.modes import Mode
from worker.settings import Settings
from worker.worker import Worker

QUEUE = {"runpod_webhook_get_job": "http://platform/job-take/$ID?"}


def worker(tmp_path: Path, **settings: Any) -> Worker:
    return Worker(Settings.model_validate(settings), tmp_path / "cause.txt")


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("argv", "settings", "mode"),
    [
        pytest.param([], QUEUE, modes.QueueMode, id="RunPod's queue"),
        pytest.param([], {**QUEUE, "port": 80}, modes.QueueMode, id="the queue comes before a port"),
        pytest.param([], {"port": 80}, modes.HttpMode, id="a port"),
        pytest.param([], {"worker_mode": "http", **QUEUE}, modes.HttpMode, id="http by name"),
        pytest.param([], {}, modes.LocalMode, id="neither"),
        pytest.param(["--rp_serve_api"], {}, modes.DevelopmentMode, id="the SDK's test server"),
        pytest.param(["--batch", "a", "--out", "b"], QUEUE, batch_mode.BatchMode, id="a batch"),
        pytest.param(["--test_input", "{}"], {"worker_mode": "local", **QUEUE}, modes.LocalMode, id="one job"),
    ],
)
def test_the_mode_follows_from_options_and_settings(
    argv: list[str], settings: dict[str, Any], mode: type[Mode], tmp_path: Path
) -> None:
    assert type(choose(read_options(argv), worker(tmp_path, **settings))) is mode


class ScriptedMode(Mode):
    """Records its steps, and fails in one of them."""

    def __init__(self, worker: Worker, failing: Mapping[str, Exception], can_refuse: bool = False) -> None:
        super().__init__(worker)
        self.steps: list[str] = []
        self._failing = failing
        self._can_refuse = can_refuse

    def listen(self, stack: ExitStack) -> None:  # noqa: ARG002
        self._step("listen")

    def load(self) -> None:
        self._step("load")

    def serve(self) -> int:
        self._step("serve")
        return 7

    def refuse(self, error: ConfigurationError) -> None:
        if not self._can_refuse:
            super().refuse(error)
        self._begin_refusal(error)
        self._step(f"refuse: {error}")

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self._failing:
            raise self._failing[name]


WRONG = ConfigurationError("wrong")


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("failing", "problem", "steps", "state"),
    [
        pytest.param({}, None, ["listen", "load", "serve"], "starting", id="all is well"),
        pytest.param({}, WRONG, ["listen", "refuse: wrong"], "refused", id="wrong settings"),
        pytest.param({"listen": WRONG}, None, ["listen", "refuse: wrong"], "refused", id="a port in use"),
        pytest.param({"load": WRONG}, None, ["listen", "load", "refuse: wrong"], "refused", id="vLLM refuses"),
        pytest.param(
            {"serve": WRONG}, None, ["listen", "load", "serve", "refuse: wrong"], "refused", id="the app is refused"
        ),
    ],
)
def test_a_mode_serves_or_refuses(
    failing: dict[str, StartupError],
    problem: ConfigurationError | None,
    steps: list[str],
    state: str,
    tmp_path: Path,
) -> None:
    mode = ScriptedMode(worker(tmp_path), failing, can_refuse=True)
    assert modes.run(mode, problem) == (7 if state == "starting" else 0)
    assert mode.steps == steps
    assert mode.worker.lifecycle.state == state


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("can_refuse", "settings"), [(False, {}), (True, {"startup_failure": "exit"})], ids=["no callers", "exit"]
)
def test_a_mode_that_does_not_refuse_ends_with_the_error(
    can_refuse: bool, settings: dict[str, str], tmp_path: Path
) -> None:
    mode = ScriptedMode(worker(tmp_path, **settings), {"load": WRONG}, can_refuse)
    with pytest.raises(ConfigurationError, match="wrong"):
        modes.run(mode, None)
    assert mode.steps == ["listen", "load"]


@pytest.mark.usefixtures("clean_registry")
def test_a_failure_that_may_pass_ends_the_worker(tmp_path: Path) -> None:
    mode = ScriptedMode(worker(tmp_path), {"load": StartupError("No network.")}, can_refuse=True)
    with pytest.raises(StartupError, match="No network"):
        modes.run(mode, None)
    assert mode.worker.lifecycle.state == "failed"
    assert "No network." in str(mode.worker.lifecycle.error())


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("jobs", "seconds"), [(modes.REFUSE_JOBS, 1), (3, modes.REFUSE_SECONDS)], ids=["enough jobs", "enough time"]
)
def test_a_worker_stops_refusing_after_a_while(jobs: int, seconds: float, tmp_path: Path) -> None:
    mode = ScriptedMode(worker(tmp_path), {}, can_refuse=True)

    async def run() -> float:
        for number in range(jobs):
            with mode.worker.telemetry.job(f"job-{number}", "control", {}):
                pass
        with pytest.raises(ConfigurationError, match="wrong"):
            await mode._end_refusal(WRONG)
        return asyncio.get_running_loop().time()

    assert run_on_virtual_clock(run()) <= seconds


class Answered(modes.LocalMode):
    """A local job with a fixed result."""

    def __init__(self, worker: Worker, result: dict[str, Any]) -> None:
        super().__init__(worker, None)
        self._result = result

    async def _answer(self) -> dict[str, Any]:
        return self._result


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("result", "code"),
    [({"status": "COMPLETED", "output": ["ä"]}, 0), ({"status": "FAILED", "error": "no"}, 1)],
    ids=["answered", "failed"],
)
def test_the_result_of_a_local_job_is_printed(
    result: dict[str, Any], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Answered(worker(tmp_path), result).serve() == code
    assert json.loads(capsys.readouterr().out) == result


DROPPED_STOP = """
import signal, sys, time
from pathlib import Path
from worker import modes
from worker.settings import Settings
from worker.worker import Worker

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

class Loading(modes.LocalMode):
    def load(self):
        Finalized()
        print("still loading", flush=True)
        time.sleep(60)

sys.exit(modes.run(Loading(Worker(Settings(), Path("cause.txt")), None), None))
"""


def test_a_stop_that_python_drops_is_repeated() -> None:
    """Python prints and drops an exception that a signal's handler raises within a finalizer."""
    done = subprocess.run(
        [sys.executable, "-c", DROPPED_STOP], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert "Exception ignored" in done.stderr
    assert (done.stdout, done.returncode) == ("still loading\n", 128 + signal.SIGTERM)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    "error", [WRONG, StartupError("The engine did not start."), RuntimeError()], ids=["settings", "engine", "library"]
)
def test_a_stop_that_became_another_error_is_a_stop(error: Exception, tmp_path: Path) -> None:
    mode = ScriptedMode(worker(tmp_path), {"load": error}, can_refuse=True)
    mode.stopped_by = signal.SIGTERM
    with pytest.raises(SystemExit) as stopped:
        modes.run(mode, None)
    assert (stopped.value.code, mode.steps) == (0, ["listen", "load"])


class Noting(SingleMachine):
    """Notes what the worker says about its end."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[str] = []

    def leave(self, what: str = STOPPED) -> None:
        self.ends.append(what)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(("stopped_by", "first"), [(None, FINISHED), (signal.SIGTERM, STOPPED)], ids=["end", "stop"])
def test_a_mode_that_was_stopped_has_not_finished(stopped_by: int | None, first: str, tmp_path: Path) -> None:
    mode = ScriptedMode(worker(tmp_path), {})
    mode.ends_by_itself, mode.stopped_by = True, stopped_by
    mode.worker.cluster = cluster = Noting()
    assert modes.run(mode, None) == 7
    assert cluster.ends[0] == first


@pytest.mark.parametrize("argv", [["--batch", "in.jsonl"], ["--out", "out.jsonl"]])
def test_a_batch_needs_both_files(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_options(argv)
    assert "--batch and --out belong together" in capsys.readouterr().err

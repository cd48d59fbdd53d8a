"""Batches on the real engine whose workers are killed, stopped or cancelled, and their memory: `make batch-kills`.

The moments of the kills are random. `BATCH_SEED` repeats those of an earlier run, whose seed is printed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest

from standin import Job, StandinServer, Status, WorkerProcess, worker_environment
from tests.conftest import API_KEY, COMMAND, HttpWorker, engine_processes, run_endpoint, run_http_worker, stop
from tests.support import tiny
from tests.support.batches import custom_ids, jsonl
from tests.support.ports import free_port
from tests.support.tiny_batches import (
    COMPLETIONS,
    LONG,
    WAIT_SECONDS,
    check_pictures,
    command,
    create_batch,
    ended_batch,
    journals,
    line,
    pictures,
    results,
    seconds_until_idle,
    wait_for_results,
)

pytestmark = [
    pytest.mark.skipif("BATCH_KILLS" not in os.environ, reason="run by make batch-kills"),
    pytest.mark.timeout(3600),
]

KILLS = int(os.environ.get("BATCH_KILLS", "20"))
COUNT = 2000
CONCURRENCY = 16
"""Few lines in flight, so that the journal grows in small steps, and every kill comes before the end of the batch."""
LOAD_SECONDS = 10.0
SHORT_LINES, FIRST_LINES = 100_000, 10_000
ALLOWED_GROWTH_MB = 50.0


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


@contextmanager
def killed_at_the_end(arguments: list[str], folder: Path, **environment: str) -> Iterator[WorkerProcess]:
    """Run a command with the embedded model, which is killed at the end of the block with all its processes."""
    (temporary := folder / "tmp").mkdir(exist_ok=True)
    environment = {**tiny.environment(), "TMPDIR": str(temporary), **environment}
    with (folder / "worker.log").open("ab") as log, WorkerProcess(arguments, environment, log) as worker:
        yield worker


def test_a_batch_whose_worker_is_killed_at_random_moments_loses_and_doubles_no_line(tmp_path: Path) -> None:
    seed = int(os.environ.get("BATCH_SEED", time.time_ns() % 1_000_000))
    chance = random.Random(seed)
    say(f"BATCH_SEED={seed}")
    (volume := tmp_path / "volume").mkdir()
    (volume / "in.jsonl").write_bytes(jsonl(pictures(COUNT)))
    moments = [("loads", "answers", "writes")[kill % 3] for kill in range(KILLS)]
    chance.shuffle(moments)
    with StandinServer() as server:
        environment = {**worker_environment(server.port), "BASE_PATH": str(volume)}
        batch = {"input": "in.jsonl", "output": "out.jsonl", "concurrency": CONCURRENCY}
        job = server.call(server.platform.submit, {"input": {"batch": batch}})
        kills_with_new_results = 0
        for kill, moment in enumerate(moments, 1):
            before = journals(volume)
            with killed_at_the_end(COMMAND, tmp_path, **environment) as worker:
                wait_for_moment(moment, chance, volume)
                worker.send_signal(signal.SIGKILL)
                assert worker.wait(timeout=20) == 128 + signal.SIGKILL
            after = journals(volume)
            say(f"kill {kill}, while it {moment}: {results(volume)} of {COUNT} lines have ended")
            # What was written stays, and the batch has not ended.
            assert after.startswith(before)
            assert not (volume / "out.jsonl").exists()
            assert job.status in (Status.IN_QUEUE, Status.IN_PROGRESS)
            kills_with_new_results += len(after) > len(before)
            server.call(server.platform.give_again, job)
        with killed_at_the_end(COMMAND, tmp_path, **environment) as worker:
            server.wait_until(lambda _: job.ended, 2 * WAIT_SECONDS)
            stop(worker)
    assert (job.status, job.error) == (Status.COMPLETED, None)
    (value,) = job.output
    assert (value["completed"], value["failed"], value["total"]) == (COUNT, 0, COUNT)
    check_pictures(volume / "out.jsonl", COUNT)
    assert sorted(path.name for path in volume.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert kills_with_new_results >= KILLS // 2
    say(f"{KILLS} kills, {kills_with_new_results} of them after new results: each of {COUNT} lines is there once")


def wait_for_moment(moment: str, chance: random.Random, volume: Path) -> None:
    """Wait until a worker is to be killed: while it loads, some time after some results, or just as it writes some."""
    if moment == "loads":
        time.sleep(chance.uniform(0, LOAD_SECONDS))
        return
    wait_for_results(volume, results(volume) + chance.randint(1, max(COUNT // KILLS, 1)))
    if moment == "answers":
        time.sleep(chance.uniform(0, 0.3))


def test_the_command_goes_on_where_it_was_interrupted_or_killed(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(jsonl(pictures(600)))
    for lines, number in ((100, signal.SIGINT), (300, signal.SIGKILL)):
        with killed_at_the_end(command(source, target), tmp_path) as process:
            wait_for_results(tmp_path, lines)
            process.send_signal(number)
            assert process.wait(timeout=60) == 128 + number
        assert not target.exists()
        say(f"{number.name}: {results(tmp_path)} of 600 lines have ended")
    with killed_at_the_end(command(source, target), tmp_path) as process:
        assert process.wait(timeout=WAIT_SECONDS) == 0
    log = (tmp_path / "worker.log").read_text()
    assert "The same command goes on from there." in log
    assert "\n600 lines: 600 completed, 0 failed; " in log
    check_pictures(target, 600)


def test_a_batch_of_openais_client_survives_that_its_worker_is_killed_and_stopped(tmp_path: Path) -> None:
    folder, output = tmp_path / "batches", tmp_path / "output.jsonl"

    def api(worker: HttpWorker) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{worker.url}/v1", api_key=API_KEY, timeout=60)

    batch_id = ""
    for lines, number, code in ((100, signal.SIGKILL, 128 + signal.SIGKILL), (300, signal.SIGTERM, 0)):
        with run_http_worker(tmp_path, BATCH_FOLDER=str(folder)) as worker:
            batch_id = batch_id or create_batch(api(worker), pictures(600))
            wait_for_results(folder, lines)
            worker.worker.send_signal(number)
            assert worker.worker.wait(timeout=20) == code
        (file,) = folder.glob(f"*/batches/{batch_id}.json")
        assert json.loads(file.read_text())["status"] == "in_progress"
        say(f"{number.name}: {results(folder)} of 600 lines have ended")
    with run_http_worker(tmp_path, BATCH_FOLDER=str(folder)) as worker:
        batch = ended_batch(api(worker), batch_id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 600, "completed": 600, "failed": 0}
        api(worker).files.content(batch.output_file_id or "").write_to_file(output)
    check_pictures(output, 600)


def test_a_cancelled_batch_leaves_the_engine_idle_within_a_second_and_a_valid_output(tmp_path: Path) -> None:
    (volume := tmp_path / "volume").mkdir()
    short = [line(f"short {number}", {"prompt": "Once", "max_tokens": 5}, COMPLETIONS) for number in range(20)]
    long = [line(f"long {number}", LONG, COMPLETIONS) for number in range(500)]
    (volume / "in.jsonl").write_bytes(jsonl([*short, *long]))
    times: list[float] = []
    with run_endpoint(tmp_path, BASE_PATH=str(volume), METRICS_PORT=str(free_port())) as endpoint:
        server, (engine,) = endpoint.server, engine_processes(endpoint.worker)
        for number in range(10):
            batch = {"input": "in.jsonl", "output": f"out-{number}.jsonl"}
            job: Job = server.call(server.platform.submit, {"input": {"batch": batch}})
            wait_for_results(volume, len(short))
            # All lines in flight are long ones now.
            time.sleep(0.5)
            began = time.monotonic()
            server.call(server.platform.cancel, job)
            times.append(seconds_until_idle(began, f"http://127.0.0.1:{endpoint.metrics_port}", engine))
            assert set(custom_ids(volume / f"out-{number}.jsonl")) == {each["custom_id"] for each in short}
            assert len(custom_ids(volume / f"out-{number}.jsonl")) == len(short)
            assert not journals(volume)
    say(f"seconds until the engine was idle: {', '.join(f'{seconds:.2f}' for seconds in times)}")
    assert max(times) < 1


def test_memory_does_not_grow_over_a_hundred_thousand_short_lines(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with source.open("wb") as file:
        for number in range(SHORT_LINES):
            body = {"model": "tiny", "prompt": f"Line {number}", "max_tokens": 1, "temperature": 0}
            file.write(jsonl([line(f"id-{number}", body, COMPLETIONS)]))
    began, done, first, most = time.monotonic(), 0, 0.0, 0.0
    with killed_at_the_end(command(source, target), tmp_path) as process:
        while is_running(process):
            if done < FIRST_LINES:
                done, first = results(tmp_path), megabytes(process)
            most = max(most if done >= FIRST_LINES else 0.0, megabytes(process))
        assert process.wait() == 0
    say(
        f"Memory of the worker's own process: {first:.0f} MB after {done:,} lines, and at most {most:.0f} MB until the "
        f"end of {SHORT_LINES:,} lines; {time.monotonic() - began:.0f} s with the load of the model"
    )
    assert done >= FIRST_LINES
    assert most - first < ALLOWED_GROWTH_MB
    assert custom_ids(target) == [f"id-{number}" for number in range(SHORT_LINES)]


def is_running(process: WorkerProcess) -> bool:
    """Wait for a moment, and return whether the process still runs."""
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return True
    return False


def megabytes(process: WorkerProcess) -> float:
    """Return the memory of the worker's own process. The model is in a child."""
    return float(psutil.Process(process.pid).memory_info().rss) / 1e6

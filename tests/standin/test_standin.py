"""The stand-in against RunPod's contract: driven by the real SDK on both sides, and by hand where that is clearer."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import runpod

from standin import Behaviour, Fault, Platform, Records, StandinServer, Status, WorkerProcess, worker_environment

ROOT = Path(__file__).parents[2]
# -P: the folder of the script holds a platform.py, which must not hide the standard library's.
ECHO_WORKER = [sys.executable, "-P", str(ROOT / "standin/echo_worker.py")]
MEGABYTE = 1_000_000


class HandWorker:
    """A worker and a client played by hand, for what the SDK would hide."""

    def __init__(self, server: StandinServer, http: httpx.Client) -> None:
        self.server = server
        self.http = http

    def post(self, route: str, body: Any = None) -> Any:
        return self.http.post(f"/{route}", json=body).raise_for_status().json()

    def get(self, route: str) -> Any:
        return self.http.get(f"/{route}").raise_for_status().json()

    def run(self, job_input: Any = None, **extras: Any) -> str:
        return str(self.post("run", {"input": job_input or {"n": 1}, **extras})["id"])

    def take(self) -> httpx.Response:
        return self.http.get("/job-take/w1?gpu=CPU&job_in_progress=0")

    def send(self, verb: str, job_id: str, text: str) -> httpx.Response:
        """Post as the SDK does: JSON text, called a form."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.http.post(f"/job-{verb}/w1/{job_id}?gpu=CPU&isStream=true", content=text, headers=form)


@pytest.fixture
def server() -> Iterator[StandinServer]:
    with StandinServer(Platform(Behaviour(take_hold=0.2, stop_hold=0.2, stream_hold=0.2))) as server:
        yield server


@pytest.fixture
def hand(server: StandinServer) -> Iterator[HandWorker]:
    with httpx.Client(base_url=server.endpoint_url, timeout=10) as http:
        yield HandWorker(server, http)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinServer]:
    """A stand-in with a worker under the real SDK."""
    log = tmp_path_factory.mktemp("worker") / "log"
    with (
        StandinServer(Platform(Behaviour(take_hold=5))) as server,
        log.open("w") as output,
        WorkerProcess(ECHO_WORKER, worker_environment(server.port), output),
    ):
        server.wait_until(lambda platform: platform.records.takes)
        yield server


@pytest.fixture
def sdk(shared: StandinServer) -> Iterator[StandinServer]:
    """The shared stand-in, with a behaviour and records of its own for each test."""
    before = shared.platform.behaviour, shared.platform.records
    shared.platform.behaviour = Behaviour(take_hold=5)
    shared.platform.records = Records()
    yield shared
    shared.call(cancel_all, shared.platform)
    shared.platform.behaviour, shared.platform.records = before


def cancel_all(platform: Platform) -> None:
    for job in platform.jobs.values():
        platform.cancel(job)


@pytest.fixture
def endpoint(sdk: StandinServer) -> Iterator[runpod.Endpoint]:
    endpoint = runpod.Endpoint("local", api_key="any")
    endpoint.rp_client.endpoint_url_base = sdk.base_url_v2
    yield endpoint
    endpoint.rp_client.rp_session.close()


@pytest.fixture
def proxy(sdk: StandinServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sdk.openai_base_url, timeout=10) as http:
        yield http


# ---- The real SDK on both sides


def test_run_sync_returns_what_the_worker_yielded(endpoint: runpod.Endpoint) -> None:
    assert endpoint.run_sync({"count": 3}, timeout=10) == ["part 0", "part 1", "part 2"]


def test_run_is_answered_at_once_and_its_output_fetched_later(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"count": 1})
    assert job.output(timeout=10) == ["part 0"]
    assert job.status() == "COMPLETED"


def test_stream_gives_every_part_once(endpoint: runpod.Endpoint) -> None:
    assert list(endpoint.run({"count": 3}).stream()) == ["part 0", "part 1", "part 2"]


@pytest.mark.parametrize(
    ("job_input", "error"),
    [
        pytest.param({"error": "no such model"}, "no such model", id="the handler yields an error"),
        pytest.param({"raise": "out of memory"}, "handler: out of memory", id="the handler raises"),
    ],
)
def test_a_failed_job_carries_its_error(sdk: StandinServer, job_input: dict[str, str], error: str) -> None:
    body = httpx.post(f"{sdk.endpoint_url}/runsync", json={"input": job_input}).json()
    assert body["status"] == "FAILED"
    assert body["error"].startswith(error)


def test_cancelling_reaches_the_handler_and_nothing_is_posted(sdk: StandinServer, endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"hang": True})
    sdk.wait_until(lambda platform: platform.jobs[job.job_id].chunks)
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    sdk.wait_until(lambda platform: job.job_id in platform.records.stop_signals)
    assert job.job_id in endpoint.run_sync({"stopped": True}, timeout=10)[0]
    assert sdk.platform.records.duplicate_dones == []


def test_a_concurrent_worker_takes_batches(sdk: StandinServer, endpoint: runpod.Endpoint) -> None:
    jobs = [endpoint.run({"hang": True}) for _ in range(3)]
    sdk.wait_until(lambda platform: all(platform.jobs[job.job_id].chunks for job in jobs))
    assert endpoint.health()["jobs"]["inProgress"] == 3
    assert endpoint.health()["workers"]["running"] == 1
    assert any(take.batch_size > 1 for take in sdk.platform.records.takes)


def test_pings_name_the_version_and_the_jobs_in_progress(sdk: StandinServer, endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"hang": True})
    sdk.wait_until(lambda platform: any(job.job_id in ping.job_ids for ping in platform.records.pings))
    assert sdk.platform.records.pings[-1].version == runpod.__version__


def test_the_openai_proxy_relays_streamed_text_as_it_is(proxy: httpx.Client) -> None:
    response = proxy.post("/chat/completions", json={"stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text == 'data: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'


def test_the_openai_proxy_answers_with_the_dict_that_was_yielded(proxy: httpx.Client) -> None:
    response = proxy.post("/chat/completions", json={"model": "m"})
    assert response.status_code == 200
    assert response.json() == {"route": "/v1/chat/completions", "body": {"model": "m"}}


def test_the_openai_proxy_answers_with_text_where_text_was_yielded(proxy: httpx.Client) -> None:
    response = proxy.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == "requests_total 1\n"


@pytest.mark.parametrize("stream", [pytest.param(True, id="streaming"), pytest.param(False, id="not streaming")])
def test_the_openai_proxy_hides_why_a_job_failed(proxy: httpx.Client, *, stream: bool) -> None:
    response = proxy.post("/completions", json={"stream": stream, "fail": "too long"})
    assert (response.status_code, response.text) == (500, "")


@pytest.mark.parametrize(
    ("get_input", "seen"),
    [
        pytest.param("absent", "absent", id="no openai_input at all"),
        pytest.param("null", None, id="null"),
        pytest.param("empty", {}, id="an empty object"),
    ],
)
def test_a_get_through_the_proxy_has_an_input_of_each_kind_that_was_reported(
    sdk: StandinServer, proxy: httpx.Client, get_input: Any, seen: Any
) -> None:
    sdk.platform.behaviour.get_input = get_input
    assert proxy.get("/models").json() == {"route": "/v1/models", "body": seen}


def test_any_method_goes_through_the_proxy(proxy: httpx.Client) -> None:
    assert proxy.delete("/responses/r1").json() == {"route": "/v1/responses/r1", "body": "absent"}


@pytest.mark.parametrize(
    ("fault", "wait", "status"),
    [
        pytest.param(Fault(status=502), 9000, Status.COMPLETED, id="a refused result is posted again"),
        pytest.param(Fault(status=429), 500, Status.IN_PROGRESS, id="after a 429 the result is lost"),
        pytest.param(Fault(reset=True), 500, Status.IN_PROGRESS, id="after a reset the result is lost"),
    ],
)
def test_the_sdk_meets_faults_of_the_result_route(sdk: StandinServer, fault: Fault, wait: int, status: Status) -> None:
    script = sdk.platform.behaviour.faults["done"] = [fault]
    response = httpx.post(f"{sdk.endpoint_url}/runsync?wait={wait}", json={"input": {"count": 1}}, timeout=10).json()
    assert response["status"] == status
    assert script == []


def test_a_result_that_arrived_without_the_worker_knowing_comes_twice(
    sdk: StandinServer, endpoint: runpod.Endpoint
) -> None:
    sdk.platform.behaviour.faults["done"] = [Fault(status=502, handled=True)]
    job = endpoint.run({"count": 1})
    sdk.wait_until(lambda platform: platform.records.duplicate_dones == [job.job_id])
    assert job.output() == ["part 0"]


# ---- Jobs and clients, by hand


def test_runsync_answers_with_the_state_of_the_moment_when_the_wait_runs_out(hand: HandWorker) -> None:
    body = hand.post("runsync?wait=50", {"input": {"n": 1}})
    assert body == {"id": body["id"], "status": "IN_QUEUE"}


def test_a_finished_job_tells_its_output_and_times(hand: HandWorker) -> None:
    job_id = hand.run()
    assert hand.take().json()["id"] == job_id
    hand.send("done", job_id, '{"output": ["a"]}')
    body = hand.get(f"status/{job_id}")
    times = {name: body.pop(name) for name in ("delayTime", "executionTime")}
    assert body == {"id": job_id, "status": "COMPLETED", "output": ["a"]}
    assert all(0 <= milliseconds < 5000 for milliseconds in times.values())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_reading_a_stream_drains_it(hand: HandWorker, method: str) -> None:
    job_id = hand.run()
    hand.take()
    hand.send("stream", job_id, '{"output": "a"}')
    first, second = (hand.http.request(method, f"/stream/{job_id}").json() for _ in range(2))
    assert first == {"status": "IN_PROGRESS", "stream": [{"output": "a"}]}
    assert second == {"status": "IN_PROGRESS", "stream": []}


def test_other_keys_of_the_request_reach_the_worker(hand: HandWorker) -> None:
    job_id = hand.run({"n": 1}, webhook="http://localhost/hook")
    assert hand.take().json() == {"id": job_id, "input": {"n": 1}, "webhook": "http://localhost/hook"}


@pytest.mark.parametrize(("drop", "keys"), [(True, {"id"}), (False, {"id", "input"})])
def test_an_empty_input_is_dropped(hand: HandWorker, keys: set[str], *, drop: bool) -> None:
    hand.server.platform.behaviour.drop_empty_input = drop
    hand.post("run", {"input": {}})
    assert set(hand.take().json()) == keys


@pytest.mark.parametrize(
    ("policy", "taken"),
    [
        pytest.param({"executionTimeout": 100}, True, id="execution takes too long"),
        pytest.param({"ttl": 100}, False, id="it waits too long in the queue"),
    ],
)
def test_a_job_times_out(hand: HandWorker, policy: dict[str, int], *, taken: bool) -> None:
    job_id = hand.run({"n": 1}, policy=policy)
    if taken:
        hand.take()
        assert hand.get("job-stop/w1") == {"jobsToStop": [job_id]}
    hand.server.wait_until(lambda platform: platform.jobs[job_id].ended)
    assert hand.get(f"status/{job_id}")["status"] == "TIMED_OUT"
    assert hand.take().status_code == 204


def test_purging_removes_what_waits_and_leaves_what_runs(hand: HandWorker) -> None:
    running, waiting = hand.run(), hand.run()
    hand.take()
    assert hand.post("purge-queue") == {"removed": 1, "status": "completed"}
    assert hand.get(f"status/{running}")["status"] == "IN_PROGRESS"
    assert hand.get(f"status/{waiting}")["status"] == "CANCELLED"
    jobs = {"completed": 0, "failed": 0, "inProgress": 1, "inQueue": 0, "retried": 0}
    assert hand.get("health")["jobs"] == jobs


def test_a_failed_job_can_be_retried(hand: HandWorker) -> None:
    job_id = hand.run()
    hand.take()
    hand.send("done", job_id, '{"error": "no luck"}')
    assert hand.post(f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    assert hand.take().json()["id"] == job_id


@pytest.mark.parametrize(
    ("route", "size"),
    [
        pytest.param("run", 10 * MEGABYTE, id="run"),
        pytest.param("runsync?wait=1", 20 * MEGABYTE, id="runsync"),
    ],
)
def test_requests_have_a_limit(hand: HandWorker, route: str, size: int) -> None:
    frame = len('{"input":{"n":""}}')
    statuses = [
        hand.http.post(f"/{route}", json={"input": {"n": "x" * (size - frame + excess)}}).status_code
        for excess in (0, 1)
    ]
    assert statuses == [200, 413]


def test_a_chunk_over_the_limit_is_refused_and_recorded(hand: HandWorker) -> None:
    job_id = hand.run()
    hand.take()
    assert hand.send("stream", job_id, f'{{"output": "{"x" * MEGABYTE}"}}').status_code == 413
    assert hand.server.platform.records.oversized_posts == [job_id]


def test_results_after_the_end_are_recorded(hand: HandWorker) -> None:
    job_id = hand.run()
    hand.take()
    hand.post(f"cancel/{job_id}")
    hand.send("stream", job_id, '{"output": "late"}')
    hand.send("done", job_id, '{"output": []}')
    hand.send("done", "unheard-of", '{"output": []}')
    assert hand.server.platform.records.late_streams == [job_id]
    assert hand.server.platform.records.duplicate_dones == [job_id, "unheard-of"]


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("wrong", 401), ("right", 200)])
def test_a_key_can_be_demanded_of_clients_alone(hand: HandWorker, key: str | None, status: int) -> None:
    hand.server.platform.behaviour.api_key = "right"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    assert hand.http.get("/health", headers=headers).status_code == status
    assert hand.http.get("/ping/w1?job_id=a,b&runpod_version=1").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/status/unheard-of", 404, id="unknown job"),
        pytest.param("POST", "/unheard-of", 404, id="unknown route"),
        pytest.param("GET", "/run", 405, id="wrong method"),
        pytest.param("POST", "/run", 400, id="no JSON"),
        pytest.param("POST", "/runsync?wait=long", 400, id="a wait that is no number"),
    ],
)
def test_wrong_requests_are_refused(hand: HandWorker, method: str, path: str, status: int) -> None:
    response = hand.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]


# ---- Long polls and the proxy, by hand


def test_a_job_reaches_a_waiting_worker_at_once(hand: HandWorker) -> None:
    hand.server.platform.behaviour.take_hold = 10
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(hand.take)
        hand.server.wait_until(lambda platform: platform.records.takes)
        start = time.monotonic()
        job_id = hand.run()
        assert taken.result().json()["id"] == job_id
        assert time.monotonic() - start < 1


def test_a_worker_that_left_during_its_poll_is_given_nothing(hand: HandWorker) -> None:
    hand.server.platform.behaviour.take_hold = 10
    with pytest.raises(httpx.ReadTimeout):
        hand.http.get("/job-take/w1?gpu=CPU", timeout=0.1)
    time.sleep(0.1)
    job_id = hand.run()
    assert hand.get(f"status/{job_id}")["status"] == "IN_QUEUE"


@pytest.mark.parametrize("status", [200, 204, 400])
def test_a_poll_without_a_job_ends_in_each_way_that_was_reported(hand: HandWorker, status: Any) -> None:
    hand.server.platform.behaviour.no_job_status = status
    response = hand.take()
    assert (response.status_code, response.content) == (status, b"")


@contextmanager
def streaming_request(hand: HandWorker) -> Iterator[tuple[str, Iterator[str]]]:
    """A streaming request to the proxy, its job taken and one chunk posted: the job's id and the text that arrives."""
    request = hand.http.build_request("POST", "/openai/v1/chat/completions", json={"stream": True})
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(hand.http.send, request, stream=True)
        job_id = hand.take().json()["id"]
        hand.send("stream", job_id, '{"output": "data: ä\\n\\n"}')
        with closing(opening.result()) as response:
            yield job_id, response.iter_text()


def test_the_proxy_relays_a_chunk_before_the_next_one_exists(hand: HandWorker) -> None:
    with streaming_request(hand) as (job_id, parts):
        assert next(parts) == "data: ä\n\n"
        hand.send("stream", job_id, '{"output": "data: 2\\n\\n"}')
        assert next(parts) == "data: 2\n\n"
        hand.send("done", job_id, '{"output": []}')
        assert list(parts) == []


def test_a_client_that_leaves_the_proxy_cancels_its_job(hand: HandWorker) -> None:
    with streaming_request(hand) as (job_id, parts):
        next(parts)
    assert hand.get("job-stop/w1") == {"jobsToStop": [job_id]}
    assert hand.get(f"status/{job_id}")["status"] == "CANCELLED"


# ---- Faults


@pytest.mark.parametrize(
    ("fault", "status", "body"),
    [
        pytest.param(Fault(status=429), 429, b"", id="too many requests"),
        pytest.param(Fault(status=200, body=b"<html>"), 200, b"<html>", id="garbage"),
    ],
)
def test_a_fault_replaces_one_answer(hand: HandWorker, fault: Fault, status: int, body: bytes) -> None:
    hand.server.platform.behaviour.faults["take"] = [fault]
    job_id = hand.run()
    faulty, good = hand.take(), hand.take()
    assert (faulty.status_code, faulty.content) == (status, body)
    assert good.json()["id"] == job_id


def test_a_fault_delays_an_answer(hand: HandWorker) -> None:
    hand.server.platform.behaviour.faults["ping"] = [Fault(delay=0.2)]
    assert hand.http.get("/ping/w1").elapsed.total_seconds() >= 0.2


@pytest.mark.parametrize(("handled", "status"), [(False, "IN_PROGRESS"), (True, "COMPLETED")])
def test_a_fault_resets_a_connection_before_or_after_the_request_has_its_effect(
    hand: HandWorker, status: str, *, handled: bool
) -> None:
    hand.server.platform.behaviour.faults["done"] = [Fault(reset=True, handled=handled)]
    job_id = hand.run()
    hand.take()
    with pytest.raises(httpx.ReadError):
        hand.send("done", job_id, '{"output": []}')
    assert hand.get(f"status/{job_id}")["status"] == status


def test_a_fault_delivers_a_job_twice(hand: HandWorker) -> None:
    hand.server.platform.behaviour.faults["take"] = [Fault(duplicate=True)]
    job_id = hand.run()
    assert [hand.take().json()["id"] for _ in range(2)] == [job_id, job_id]
    assert hand.take().status_code == 204


# ---- The command line


def run_cli(port: int, *command: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "standin", "--port", str(port), "--", *command]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_port_in_use_is_reported(server: StandinServer) -> None:
    with run_cli(server.port, "true") as cli:
        _, said = cli.communicate(timeout=20)
    assert (cli.returncode, said) == (2, f"Port {server.port} is already in use.\n")


def test_a_worker_that_never_becomes_ready_is_reported() -> None:
    # The pipe ends only when every process that inherited it has: the abandoned sleep is gone by then.
    with run_cli(0, "sh", "-c", "sleep 60 & exit 7") as cli:
        _, said = cli.communicate(timeout=20)
    assert (cli.returncode, said) == (7, "The worker ended with exit code 7 before it was ready.\n")


def test_a_command_that_does_not_exist_is_reported() -> None:
    with run_cli(0, "/no/such/command") as cli:
        _, said = cli.communicate(timeout=20)
    assert cli.returncode == 2
    assert said.startswith("The worker cannot be started:")


TAKING_WORKER = """
import os, signal, sys, urllib.request
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
urllib.request.urlopen(os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", "w"))
"""


def test_a_ready_worker_is_announced_and_signals_and_exit_code_are_passed_on() -> None:
    with run_cli(0, sys.executable, "-c", TAKING_WORKER) as cli:
        assert cli.stderr is not None
        said = [cli.stderr.readline() for _ in range(3)]
        cli.send_signal(signal.SIGTERM)
        cli.communicate(timeout=20)
    assert "/v2/local/openai/v1" in said[1]
    assert "/v2/local/runsync" in said[2]
    assert cli.returncode == 5

"""The stand-in behaves as RunPod's platform does: with the real SDK as worker and client, and with direct calls."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import runpod

from standin import Behaviour, Fault, Platform, Records, StandinServer, Status, WorkerProcess, worker_environment

ROOT = Path(__file__).parents[2]
# -P keeps the script's folder off sys.path: its platform.py would shadow the standard library's module.
ECHO_WORKER = [sys.executable, "-P", str(ROOT / "standin/echo_worker.py")]
MEGABYTE = 1_000_000


class DirectCalls:
    """Calls the routes of workers and clients directly, for details that the SDK hides."""

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
        """Post as the SDK does: JSON text labelled as form data."""
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        return self.http.post(f"/job-{verb}/w1/{job_id}?gpu=CPU&isStream=true", content=text, headers=form)


@pytest.fixture
def server() -> Iterator[StandinServer]:
    with StandinServer(Platform(Behaviour(take_hold=0.2, stop_hold=0.2, stream_hold=0.2))) as server:
        yield server


@pytest.fixture
def direct(server: StandinServer) -> Iterator[DirectCalls]:
    with httpx.Client(base_url=server.endpoint_url, timeout=10) as http:
        yield DirectCalls(server, http)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandinServer]:
    """A stand-in with a worker that runs the real SDK."""
    log = tmp_path_factory.mktemp("worker") / "log"
    with (
        StandinServer(Platform(Behaviour(take_hold=5))) as server,
        log.open("w") as output,
        WorkerProcess(ECHO_WORKER, worker_environment(server.port), output),
    ):
        server.wait_until(lambda platform: platform.records.takes)
        yield server


@pytest.fixture
def sdk_server(shared_server: StandinServer) -> Iterator[StandinServer]:
    """The shared stand-in, with new behaviour and records for each test."""
    before = shared_server.platform.behaviour, shared_server.platform.records
    shared_server.platform.behaviour = Behaviour(take_hold=5)
    shared_server.platform.records = Records()
    yield shared_server
    shared_server.call(cancel_all, shared_server.platform)
    shared_server.platform.behaviour, shared_server.platform.records = before


def cancel_all(platform: Platform) -> None:
    for job in platform.jobs.values():
        platform.cancel(job)


@pytest.fixture
def endpoint(sdk_server: StandinServer) -> Iterator[runpod.Endpoint]:
    endpoint = runpod.Endpoint("local", api_key="any")
    endpoint.rp_client.endpoint_url_base = sdk_server.base_url_v2
    yield endpoint
    endpoint.rp_client.rp_session.close()


@pytest.fixture
def proxy(sdk_server: StandinServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sdk_server.openai_base_url, timeout=10) as http:
        yield http


# ---- The real SDK as worker and client


def test_run_sync_returns_the_workers_yields(endpoint: runpod.Endpoint) -> None:
    assert endpoint.run_sync({"count": 3}, timeout=10) == ["part 0", "part 1", "part 2"]


def test_the_output_of_run_can_be_fetched_later(endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"count": 1})
    assert job.output(timeout=10) == ["part 0"]
    assert job.status() == "COMPLETED"


def test_stream_returns_every_chunk_once(endpoint: runpod.Endpoint) -> None:
    assert list(endpoint.run({"count": 3}).stream()) == ["part 0", "part 1", "part 2"]


@pytest.mark.parametrize(
    ("job_input", "error"),
    [
        pytest.param({"error": "no such model"}, "no such model", id="the handler yields an error"),
        pytest.param({"raise": "out of memory"}, "handler: out of memory", id="the handler raises"),
    ],
)
def test_a_failed_job_carries_its_error(sdk_server: StandinServer, job_input: dict[str, str], error: str) -> None:
    body = httpx.post(f"{sdk_server.endpoint_url}/runsync", json={"input": job_input}).json()
    assert body["status"] == "FAILED"
    assert body["error"].startswith(error)


def test_a_cancelled_job_is_stopped_and_posts_no_result(sdk_server: StandinServer, endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"hang": True})
    sdk_server.wait_until(lambda platform: platform.jobs[job.job_id].chunks)
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    sdk_server.wait_until(lambda platform: job.job_id in platform.records.stop_signals)
    assert job.job_id in endpoint.run_sync({"stopped": True}, timeout=10)[0]
    assert sdk_server.platform.records.duplicate_dones == []


def test_a_concurrent_worker_takes_batches(sdk_server: StandinServer, endpoint: runpod.Endpoint) -> None:
    jobs = [endpoint.run({"hang": True}) for _ in range(3)]
    sdk_server.wait_until(lambda platform: all(platform.jobs[job.job_id].chunks for job in jobs))
    assert endpoint.health()["jobs"]["inProgress"] == 3
    assert endpoint.health()["workers"]["running"] == 1
    assert any(take.batch_size > 1 for take in sdk_server.platform.records.takes)


def test_pings_carry_the_version_and_the_running_jobs(sdk_server: StandinServer, endpoint: runpod.Endpoint) -> None:
    job = endpoint.run({"hang": True})
    sdk_server.wait_until(lambda platform: any(job.job_id in ping.job_ids for ping in platform.records.pings))
    assert sdk_server.platform.records.pings[-1].version == runpod.__version__


def test_the_openai_proxy_relays_streamed_text_unchanged(proxy: httpx.Client) -> None:
    response = proxy.post("/chat/completions", json={"stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.text == 'data: {"n": 1}\n\ndata: {"n": 2}\n\ndata: [DONE]\n\n'


def test_the_openai_proxy_answers_a_yielded_dict_as_json(proxy: httpx.Client) -> None:
    response = proxy.post("/chat/completions", json={"model": "m"})
    assert response.status_code == 200
    assert response.json() == {"route": "/v1/chat/completions", "body": {"model": "m"}}


def test_the_openai_proxy_answers_a_yielded_string_as_text(proxy: httpx.Client) -> None:
    response = proxy.get("/metrics")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text == "requests_total 1\n"


@pytest.mark.parametrize("stream", [pytest.param(True, id="streaming"), pytest.param(False, id="not streaming")])
def test_the_openai_proxy_hides_the_error_of_a_failed_job(proxy: httpx.Client, *, stream: bool) -> None:
    response = proxy.post("/completions", json={"stream": stream, "fail": "too long"})
    assert (response.status_code, response.text) == (500, "")


@pytest.mark.parametrize(
    ("get_input", "expected"),
    [
        pytest.param("absent", "absent", id="no openai_input at all"),
        pytest.param("null", None, id="null"),
        pytest.param("empty", {}, id="an empty object"),
    ],
)
def test_the_input_of_a_get_through_the_proxy_has_each_reported_form(
    sdk_server: StandinServer, proxy: httpx.Client, get_input: Any, expected: Any
) -> None:
    sdk_server.platform.behaviour.get_input = get_input
    assert proxy.get("/models").json() == {"route": "/v1/models", "body": expected}


def test_the_proxy_accepts_any_method(proxy: httpx.Client) -> None:
    assert proxy.delete("/responses/r1").json() == {"route": "/v1/responses/r1", "body": "absent"}


@pytest.mark.parametrize(
    ("fault", "wait", "status"),
    [
        pytest.param(Fault(status=502), 9000, Status.COMPLETED, id="posted again after a 502"),
        pytest.param(Fault(status=429), 500, Status.IN_PROGRESS, id="lost after a 429"),
        pytest.param(Fault(reset=True), 500, Status.IN_PROGRESS, id="lost after a reset"),
    ],
)
def test_the_sdk_posts_a_result_again_only_after_a_server_error(
    sdk_server: StandinServer, fault: Fault, wait: int, status: Status
) -> None:
    script = sdk_server.platform.behaviour.faults["done"] = [fault]
    response = httpx.post(
        f"{sdk_server.endpoint_url}/runsync?wait={wait}", json={"input": {"count": 1}}, timeout=10
    ).json()
    assert response["status"] == status
    assert script == []


def test_a_result_whose_answer_is_lost_is_posted_twice(sdk_server: StandinServer, endpoint: runpod.Endpoint) -> None:
    sdk_server.platform.behaviour.faults["done"] = [Fault(status=502, handled=True)]
    job = endpoint.run({"count": 1})
    sdk_server.wait_until(lambda platform: platform.records.duplicate_dones == [job.job_id])
    assert job.output() == ["part 0"]


# ---- Jobs and clients, with direct calls


def test_runsync_answers_with_the_current_status_after_the_wait(direct: DirectCalls) -> None:
    body = direct.post("runsync?wait=50", {"input": {"n": 1}})
    assert body == {"id": body["id"], "status": "IN_QUEUE"}


def test_the_status_of_a_finished_job_has_its_output_and_times(direct: DirectCalls) -> None:
    job_id = direct.run()
    assert direct.take().json()["id"] == job_id
    direct.send("done", job_id, '{"output": ["a"]}')
    body = direct.get(f"status/{job_id}")
    times = {name: body.pop(name) for name in ("delayTime", "executionTime")}
    assert body == {"id": job_id, "status": "COMPLETED", "output": ["a"]}
    assert all(0 <= milliseconds < 5000 for milliseconds in times.values())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_stream_returns_each_chunk_to_one_call_only(direct: DirectCalls, method: str) -> None:
    job_id = direct.run()
    direct.take()
    direct.send("stream", job_id, '{"output": "a"}')
    first, second = (direct.http.request(method, f"/stream/{job_id}").json() for _ in range(2))
    assert first == {"status": "IN_PROGRESS", "stream": [{"output": "a"}]}
    assert second == {"status": "IN_PROGRESS", "stream": []}


def test_other_keys_of_the_request_reach_the_worker(direct: DirectCalls) -> None:
    job_id = direct.run({"n": 1}, webhook="http://localhost/hook")
    assert direct.take().json() == {"id": job_id, "input": {"n": 1}, "webhook": "http://localhost/hook"}


@pytest.mark.parametrize(("drop", "keys"), [(True, {"id"}), (False, {"id", "input"})])
def test_an_empty_input_is_dropped(direct: DirectCalls, keys: set[str], *, drop: bool) -> None:
    direct.server.platform.behaviour.drop_empty_input = drop
    direct.post("run", {"input": {}})
    assert set(direct.take().json()) == keys


@pytest.mark.parametrize(
    ("policy", "taken"),
    [
        pytest.param({"executionTimeout": 100}, True, id="execution takes too long"),
        pytest.param({"ttl": 100}, False, id="waits too long in the queue"),
    ],
)
def test_a_job_times_out(direct: DirectCalls, policy: dict[str, int], *, taken: bool) -> None:
    job_id = direct.run({"n": 1}, policy=policy)
    if taken:
        direct.take()
        assert direct.get("job-stop/w1") == {"jobsToStop": [job_id]}
    direct.server.wait_until(lambda platform: platform.jobs[job_id].ended)
    assert direct.get(f"status/{job_id}")["status"] == "TIMED_OUT"
    assert direct.take().status_code == 204


def test_purging_cancels_queued_jobs_and_not_running_ones(direct: DirectCalls) -> None:
    running, waiting = direct.run(), direct.run()
    direct.take()
    assert direct.post("purge-queue") == {"removed": 1, "status": "completed"}
    assert direct.get(f"status/{running}")["status"] == "IN_PROGRESS"
    assert direct.get(f"status/{waiting}")["status"] == "CANCELLED"
    jobs = {"completed": 0, "failed": 0, "inProgress": 1, "inQueue": 0, "retried": 0}
    assert direct.get("health")["jobs"] == jobs


def test_a_failed_job_can_be_retried(direct: DirectCalls) -> None:
    job_id = direct.run()
    direct.take()
    direct.send("done", job_id, '{"error": "no luck"}')
    assert direct.post(f"retry/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    assert direct.take().json()["id"] == job_id


@pytest.mark.parametrize(
    ("route", "size"),
    [
        pytest.param("run", 10 * MEGABYTE, id="run"),
        pytest.param("runsync?wait=1", 20 * MEGABYTE, id="runsync"),
    ],
)
def test_requests_have_a_size_limit(direct: DirectCalls, route: str, size: int) -> None:
    overhead = len('{"input":{"n":""}}')
    statuses = [
        direct.http.post(f"/{route}", json={"input": {"n": "x" * (size - overhead + excess)}}).status_code
        for excess in (0, 1)
    ]
    assert statuses == [200, 413]


def test_a_chunk_over_the_limit_is_refused_and_recorded(direct: DirectCalls) -> None:
    job_id = direct.run()
    direct.take()
    assert direct.send("stream", job_id, f'{{"output": "{"x" * MEGABYTE}"}}').status_code == 413
    assert direct.server.platform.records.oversized_posts == [job_id]


@pytest.mark.parametrize("status", [400, 413])
def test_a_result_over_the_limit_is_refused_and_recorded(direct: DirectCalls, status: int) -> None:
    behaviour = direct.server.platform.behaviour
    behaviour.done_post_limit, behaviour.done_refusal_status = len('{"output": "xx"}'), status
    job_id = direct.run()
    direct.take()
    assert direct.send("done", job_id, '{"output": "xxx"}').status_code == status
    assert direct.get(f"status/{job_id}")["status"] == "IN_PROGRESS"
    assert direct.send("done", job_id, '{"output": "xx"}').status_code == 200
    assert direct.server.platform.records.oversized_posts == [job_id]


def test_chunks_and_results_of_ended_jobs_are_recorded(direct: DirectCalls) -> None:
    job_id = direct.run()
    direct.take()
    direct.post(f"cancel/{job_id}")
    direct.send("stream", job_id, '{"output": "late"}')
    direct.send("done", job_id, '{"output": []}')
    direct.send("done", "unknown", '{"output": []}')
    assert direct.server.platform.records.late_streams == [job_id]
    assert direct.server.platform.records.duplicate_dones == [job_id, "unknown"]


def test_two_workers_share_the_queue(direct: DirectCalls) -> None:
    job_ids = [direct.run() for _ in range(3)]
    assert len(direct.get("job-take-batch/w1?batch_size=2")) == 2
    assert direct.get("job-take/w2")["id"] == job_ids[2]
    assert direct.server.call(direct.server.platform.jobs_per_worker) == {"w1": 2, "w2": 1}
    direct.post(f"cancel/{job_ids[2]}")
    assert direct.get("job-stop/w2") == {"jobsToStop": [job_ids[2]]}
    assert direct.http.get("/job-stop/w1").status_code == 204


@pytest.mark.parametrize("stopped", [pytest.param(True, id="stopped"), pytest.param(False, id="running")])
def test_a_job_is_given_again(direct: DirectCalls, *, stopped: bool) -> None:
    job_id = direct.run({"n": 1}, policy={"executionTimeout": 300})
    direct.take()
    if stopped:
        direct.post(f"cancel/{job_id}")
    platform = direct.server.platform
    direct.server.call(platform.give_again, platform.jobs[job_id])
    time.sleep(0.3)
    # The execution timeout of the first run is over, but the job waits in the queue.
    assert direct.get(f"status/{job_id}") == {"id": job_id, "status": "IN_QUEUE"}
    assert direct.take().json()["id"] == job_id
    assert direct.http.get("/job-stop/w1").status_code == (200 if stopped else 204)
    direct.send("done", job_id, '{"output": ["a"]}')
    assert direct.get(f"status/{job_id}")["output"] == ["a"]


@pytest.mark.parametrize("taken", [pytest.param(True, id="running"), pytest.param(False, id="queued")])
def test_a_forgotten_job_is_unknown_to_clients_and_workers(direct: DirectCalls, *, taken: bool) -> None:
    job_id = direct.run()
    if taken:
        direct.take()
    platform = direct.server.platform
    direct.server.call(platform.forget, platform.jobs[job_id])
    assert direct.http.get(f"/status/{job_id}").status_code == 404
    assert [direct.send(verb, job_id, '{"output": "a"}').status_code for verb in ("stream", "done")] == [404, 404]
    assert direct.take().status_code == direct.http.get("/job-stop/w1").status_code == 204
    assert (platform.records.stream_posts, platform.records.late_streams) == (1, [])


def test_forgetting_a_job_ends_the_wait_of_its_client(direct: DirectCalls) -> None:
    platform = direct.server.platform
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(direct.post, "runsync", {"input": {"n": 1}})
        direct.server.wait_until(lambda platform: platform.jobs)
        direct.server.call(platform.forget, next(iter(platform.jobs.values())))
        assert answer.result()["status"] == "CANCELLED"


def test_job_stop_names_a_job_once_or_again_and_again(direct: DirectCalls) -> None:
    behaviour = direct.server.platform.behaviour
    job_id = direct.run()
    direct.take()
    direct.post(f"cancel/{job_id}")
    behaviour.repeat_stops = True
    assert [direct.get("job-stop/w1") for _ in range(2)] == [{"jobsToStop": [job_id]}] * 2
    behaviour.repeat_stops = False
    assert [direct.http.get("/job-stop/w1").status_code for _ in range(2)] == [200, 204]


@pytest.mark.parametrize(("key", "status"), [(None, 401), ("wrong", 401), ("right", 200)])
def test_an_api_key_is_required_of_clients_and_not_of_workers(
    direct: DirectCalls, key: str | None, status: int
) -> None:
    direct.server.platform.behaviour.api_key = "right"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    assert direct.http.get("/health", headers=headers).status_code == status
    assert direct.http.get("/ping/w1?job_id=a,b&runpod_version=1").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/status/unknown", 404, id="unknown job"),
        pytest.param("POST", "/unknown", 404, id="unknown route"),
        pytest.param("GET", "/run", 405, id="wrong method"),
        pytest.param("POST", "/run", 400, id="no body"),
        pytest.param("POST", "/runsync?wait=long", 400, id="wait is not a number"),
    ],
)
def test_wrong_requests_are_refused(direct: DirectCalls, method: str, path: str, status: int) -> None:
    response = direct.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]


# ---- Long polls and the proxy, with direct calls


def test_a_job_reaches_a_waiting_worker_at_once(direct: DirectCalls) -> None:
    direct.server.platform.behaviour.take_hold = 10
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(direct.take)
        direct.server.wait_until(lambda platform: platform.records.takes)
        start = time.monotonic()
        job_id = direct.run()
        assert taken.result().json()["id"] == job_id
        assert time.monotonic() - start < 1


def test_a_worker_that_disconnected_gets_no_job(direct: DirectCalls) -> None:
    direct.server.platform.behaviour.take_hold = 10
    with pytest.raises(httpx.ReadTimeout):
        direct.http.get("/job-take/w1?gpu=CPU", timeout=0.1)
    time.sleep(0.1)
    job_id = direct.run()
    assert direct.get(f"status/{job_id}")["status"] == "IN_QUEUE"


@pytest.mark.parametrize("status", [200, 204, 400])
def test_a_take_without_a_job_has_each_reported_status(direct: DirectCalls, status: Any) -> None:
    direct.server.platform.behaviour.no_job_status = status
    response = direct.take()
    assert (response.status_code, response.content) == (status, b"")


@contextmanager
def streaming_request(direct: DirectCalls) -> Iterator[tuple[str, Iterator[str]]]:
    """Send a streaming request to the proxy, take its job and post one chunk. Yield the job's id and the text."""
    request = direct.http.build_request("POST", "/openai/v1/chat/completions", json={"stream": True})
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(direct.http.send, request, stream=True)
        job_id = direct.take().json()["id"]
        direct.send("stream", job_id, '{"output": "data: ä\\n\\n"}')
        with closing(opening.result()) as response:
            yield job_id, response.iter_text()


def test_the_proxy_relays_each_chunk_at_once(direct: DirectCalls) -> None:
    with streaming_request(direct) as (job_id, parts):
        assert next(parts) == "data: ä\n\n"
        direct.send("stream", job_id, '{"output": "data: 2\\n\\n"}')
        assert next(parts) == "data: 2\n\n"
        direct.send("done", job_id, '{"output": []}')
        assert list(parts) == []


def test_a_client_that_disconnects_from_the_proxy_cancels_its_job(direct: DirectCalls) -> None:
    with streaming_request(direct) as (job_id, parts):
        next(parts)
    assert direct.get("job-stop/w1") == {"jobsToStop": [job_id]}
    assert direct.get(f"status/{job_id}")["status"] == "CANCELLED"


# ---- Faults


@pytest.mark.parametrize(
    ("fault", "status", "body"),
    [
        pytest.param(Fault(status=429), 429, b"", id="too many requests"),
        pytest.param(Fault(status=200, body=b"<html>"), 200, b"<html>", id="garbage"),
    ],
)
def test_a_fault_replaces_one_answer(direct: DirectCalls, fault: Fault, status: int, body: bytes) -> None:
    direct.server.platform.behaviour.faults["take"] = [fault]
    job_id = direct.run()
    faulty, good = direct.take(), direct.take()
    assert (faulty.status_code, faulty.content) == (status, body)
    assert good.json()["id"] == job_id


def test_a_fault_delays_an_answer(direct: DirectCalls) -> None:
    direct.server.platform.behaviour.faults["ping"] = [Fault(delay=0.2)]
    assert direct.http.get("/ping/w1").elapsed.total_seconds() >= 0.2


@pytest.mark.parametrize(("handled", "status"), [(False, "IN_PROGRESS"), (True, "COMPLETED")])
def test_a_fault_resets_the_connection_before_or_after_the_request_is_handled(
    direct: DirectCalls, status: str, *, handled: bool
) -> None:
    direct.server.platform.behaviour.faults["done"] = [Fault(reset=True, handled=handled)]
    job_id = direct.run()
    direct.take()
    with pytest.raises(httpx.ReadError):
        direct.send("done", job_id, '{"output": []}')
    assert direct.get(f"status/{job_id}")["status"] == status


def test_a_fault_delivers_a_job_twice(direct: DirectCalls) -> None:
    direct.server.platform.behaviour.faults["take"] = [Fault(duplicate=True)]
    job_id = direct.run()
    assert [direct.take().json()["id"] for _ in range(2)] == [job_id, job_id]
    assert direct.take().status_code == 204


def test_the_body_of_an_answer_to_a_post_comes_late(direct: DirectCalls) -> None:
    direct.server.platform.behaviour.answer_delay = 0.2
    # A refused post has an answer body too.
    for text, status in (('{"output": "a"}', 200), ("no JSON", 400)):
        response = direct.send("stream", "unknown", text)
        assert (response.status_code, bool(response.content)) == (status, True)
        assert response.elapsed.total_seconds() >= 0.2


def test_the_head_of_an_answer_with_a_late_body_comes_at_once(direct: DirectCalls) -> None:
    direct.server.platform.behaviour.answer_delay = 60
    url, timeout = "/job-stream/w1/unknown", httpx.Timeout(10, read=0.5)
    with direct.http.stream("POST", url, json={}, timeout=timeout) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.ReadTimeout):
            response.read()


def test_the_connections_of_posts_are_counted(direct: DirectCalls) -> None:
    for verb in ("stream", "stream", "done"):
        direct.send(verb, "unknown", "{}")
    assert direct.get("records")["post_connections"] == 1
    direct.server.platform.behaviour.answer_delay = 0.2
    for _ in range(2):
        # The client closes the connection of an answer that it has not read.
        with direct.http.stream("POST", "/job-stream/w1/unknown", json={}):
            pass
    assert direct.get("records")["post_connections"] == 2
    direct.send("done", "unknown", "{}")
    assert direct.get("records")["post_connections"] == 3


def test_the_status_shows_the_progress_of_a_job_until_it_ends(direct: DirectCalls) -> None:
    job_id = direct.run()
    direct.take()
    direct.send("done", job_id, '{"status": "IN_PROGRESS", "output": {"percent": 50}}')
    report = direct.get(f"status/{job_id}")
    assert (report["status"], report["output"]) == ("IN_PROGRESS", {"percent": 50})
    direct.send("done", job_id, '{"output": ["end"]}')
    direct.send("done", job_id, '{"status": "IN_PROGRESS", "output": {"percent": 99}}')
    assert direct.get(f"status/{job_id}")["output"] == ["end"]
    records = direct.server.platform.records
    assert (records.progress_posts, records.done_posts) == (2, 1)


def test_an_outage_resets_workers_and_ends_by_itself(direct: DirectCalls) -> None:
    job_id = direct.run()
    outage = direct.server.outage(1)
    for _ in range(2):
        with pytest.raises(httpx.ReadError):
            direct.take()
    assert direct.get(f"status/{job_id}")["status"] == "IN_QUEUE"
    outage.result(timeout=10)
    assert direct.take().json()["id"] == job_id


def test_an_outage_ends_waiting_polls(direct: DirectCalls) -> None:
    direct.server.platform.behaviour.take_hold = 60
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(direct.take)
        direct.server.wait_until(lambda platform: platform.records.takes)
        direct.server.outage(60)
        with pytest.raises(httpx.ReadError):
            taken.result()


# ---- The command line


def run_cli(port: int, *command: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "standin", "--port", str(port), *options, "--", *command]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_port_in_use_is_reported(server: StandinServer) -> None:
    with run_cli(server.port, "true") as cli:
        _, stderr = cli.communicate(timeout=20)
    assert (cli.returncode, stderr) == (2, f"Port {server.port} is already in use. Choose another port with --port.\n")


def test_a_worker_that_never_becomes_ready_is_reported() -> None:
    # stderr closes only after every process that inherited it has ended, so this also checks that `sleep` was killed.
    with run_cli(0, "sh", "-c", "sleep 60 & exit 7") as cli:
        _, stderr = cli.communicate(timeout=20)
    assert (cli.returncode, stderr) == (7, "The worker ended with exit code 7 before it was ready.\n")


def test_a_command_that_does_not_exist_is_reported() -> None:
    with run_cli(0, "/no/such/command") as cli:
        _, stderr = cli.communicate(timeout=20)
    assert cli.returncode == 2
    assert stderr.startswith("The worker cannot be started:")


TAKING_WORKER = """
import os, signal, sys, urllib.request
name = os.environ["RUNPOD_POD_ID"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5 if name == "worker-1" else 0))
urllib.request.urlopen(os.environ["RUNPOD_WEBHOOK_GET_JOB"].replace("$ID", name))
"""


def test_a_ready_worker_is_reported_and_its_signals_and_exit_code_are_forwarded() -> None:
    with run_cli(0, sys.executable, "-c", TAKING_WORKER) as cli:
        assert cli.stderr is not None
        lines = [cli.stderr.readline() for _ in range(3)]
        cli.send_signal(signal.SIGTERM)
        cli.communicate(timeout=20)
    assert "/v2/local/openai/v1" in lines[1]
    assert "/v2/local/runsync" in lines[2]
    assert cli.returncode == 5


def test_several_workers_are_started_and_signalled_together() -> None:
    with run_cli(0, sys.executable, "-c", TAKING_WORKER, options=["--workers", "2"]) as cli:
        assert cli.stderr is not None
        assert cli.stderr.readline() == "All 2 workers are ready.\n"
        cli.send_signal(signal.SIGTERM)
        _, stderr = cli.communicate(timeout=20)
    ends = {"worker-1 ended with exit code 5.", "worker-2 ended with exit code 0."}
    assert set(stderr.splitlines()[-2:]) == ends
    assert cli.returncode == 5


def test_a_number_of_workers_below_1_is_reported() -> None:
    with run_cli(0, "true", options=["--workers", "0"]) as cli:
        _, stderr = cli.communicate(timeout=20)
    assert cli.returncode == 2
    assert stderr.endswith("--workers 0 is too small. Start at least 1 worker.\n")

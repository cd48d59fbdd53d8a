"""How the platform's client and a job's delivery treat answers, with a scripted transport, on a virtual clock."""

import asyncio
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.support.clock import VirtualLoop, run_on_virtual_clock
from tests.support.urls import URLS
from worker.errors import Json, ResultRefusedError
from worker.queue.delivery import Delivery
from worker.queue.handler import Job
from worker.queue.platform import FORGOTTEN_ANSWERS, JobLostError, Platform
from worker.queue.transport import POST_SECONDS, Answer, NoAnswerError
from worker.resume import Resumes

DEADLINE = 900.0


class Script:
    """A transport whose answers are the items of `answers`, each after `seconds`, and then always 200.

    The worker is frozen for `frozen` seconds during each post.
    """

    def __init__(self, *answers: int | Exception | Answer | None, seconds: float = 0.0, frozen: float = 0.0) -> None:
        self.answers: Iterator[Any] = iter(answers)
        self.seconds = seconds
        self.frozen = frozen
        self.resumes = Resumes()
        self.posts: list[tuple[str, Any]] = []
        self.polls: list[tuple[float, str]] = []

    async def get(self, url: str, stopping: asyncio.Event | None = None) -> Answer | None:  # noqa: ARG002
        self.polls.append((asyncio.get_running_loop().time(), url))
        answer = next(self.answers, Answer(200))
        if isinstance(answer, Exception):
            raise answer
        return answer if answer is None or isinstance(answer, Answer) else Answer(answer)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:  # noqa: ARG002
        self.posts.append((url.partition("/")[0], json.loads(body)))
        await asyncio.sleep(self.seconds)
        if self.frozen:
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.jump(self.frozen)
            self.resumes.resumed(self.frozen)
        answer = next(self.answers, 200)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    def platform(self, stopping: asyncio.Event | None = None) -> Platform:
        return Platform(self, URLS, stopping or asyncio.Event(), DEADLINE, self.resumes)

    def deliver(self, *parts: Any) -> tuple[list[Any], list[Any]]:
        """Deliver a job with these parts; return the posted parts and results."""

        async def run() -> None:
            delivery = Delivery(self.platform(), {"id": "job"}, lambda: None)
            for part in parts:
                await delivery.part(part)
            await delivery.done()

        run_on_virtual_clock(run())
        return self.posted("stream"), self.posted("done")

    def posted(self, route: str) -> list[Any]:
        return [value for posted, value in self.posts if posted == route]


AWAY = NoAnswerError("ClientConnectionError")


def test_parts_and_result_are_posted_once_in_order() -> None:
    parts, results = Script().deliver("a", "b")
    assert (parts, results) == ([{"output": "a"}, {"output": "b"}], [{"output": ["a", "b"]}])


@pytest.mark.parametrize("failure", [AWAY, 302, 408, 429, 500, 503])
def test_a_post_is_repeated_while_the_platform_does_not_accept_it(failure: Any) -> None:
    parts, results = Script(failure, failure, 200, failure, 200).deliver("a")
    assert (len(parts), len(results)) == (3, 2)


def test_a_post_is_repeated_after_the_worker_was_frozen() -> None:
    assert len(Script(AWAY, frozen=3600).deliver()[1]) == 2


@pytest.mark.parametrize(("seconds", "attempts"), [(0.0, range(80, 150)), (POST_SECONDS, range(13, 16))])
def test_a_job_is_lost_after_the_deadline(seconds: float, attempts: range) -> None:
    script = Script(*[AWAY] * 1000, seconds=seconds)
    with pytest.raises(JobLostError, match="DELIVERY_TIMEOUT=900"):
        script.deliver("a")
    assert len(script.posts) in attempts


@pytest.mark.parametrize("status", [400, 413, 422])
def test_after_a_refused_part_only_the_result_is_posted(status: int) -> None:
    parts, results = Script(200, status).deliver("a", "b", "c")
    assert parts == [{"output": "a"}, {"output": "b"}]
    assert results == [{"output": ["a", "b", "c"]}]


def test_a_part_that_is_too_large_ends_the_stream_without_being_posted() -> None:
    large = "x" * 1_000_001
    parts, results = Script().deliver("a", large, "b")
    assert (parts, results) == ([{"output": "a"}], [{"output": ["a", large, "b"]}])


def test_objects_are_posted_without_the_spaces_that_would_make_them_too_large() -> None:
    chunks = [{"index": number} for number in range(60_000)]
    assert len(json.dumps(chunks)) > 1_000_000 > len(json.dumps(chunks, separators=(",", ":")))
    assert Script().deliver(chunks)[0] == [{"output": chunks}]


@pytest.mark.parametrize("status", [400, 401, 413, 422])
def test_a_refused_result_is_followed_by_an_error(status: int) -> None:
    _, results = Script(200, status).deliver("a")
    assert results[0] == {"output": ["a"]}
    assert f"(HTTP {status})" in json.loads(results[1]["error"])["message"]


def test_a_job_whose_error_is_refused_too_ends() -> None:
    assert len(Script(200, 400, 400).deliver("a")[1]) == 2


def test_a_result_that_is_too_large_is_not_posted() -> None:
    _, (result,) = Script().deliver("x" * 20_000_001)
    message = json.loads(result["error"])["message"]
    assert message.startswith("RunPod does not accept 20.0 MB of output. A result may have at most 20 MB.")


class Shelf:
    """Keeps results, or fails with these reasons."""

    def __init__(self, *failures: str) -> None:
        self.failures = failures
        self.kept: list[tuple[Job, bytes]] = []

    async def store(self, job: Job, data: bytes, refusal: ResultRefusedError) -> Json:
        self.kept.append((job, data))
        if self.failures:
            raise ResultRefusedError(refusal.size, refusal.answer, self.failures)
        return {"result_path": "/there"}


def deliver_to(shelf: Shelf, script: Script, *parts: Any) -> list[Any]:
    """Deliver a job whose large results are kept on the shelf, and return the posted results."""

    async def run() -> None:
        delivery = Delivery(script.platform(), {"id": "job"}, lambda: None, shelf.store)
        for part in parts:
            await delivery.part(part)
        await delivery.done()

    run_on_virtual_clock(run())
    return script.posted("done")


def test_a_result_that_is_too_large_is_kept_as_the_json_that_would_have_been_posted() -> None:
    shelf, parts = Shelf(), ["é" * 10_000_000, {"a": 1}]
    assert deliver_to(shelf, Script(), *parts) == [{"output": {"result_path": "/there"}}]
    ((job, data),) = shelf.kept
    assert job == {"id": "job"}
    assert data == json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()


@pytest.mark.parametrize("result", [pytest.param("x" * 1_000_001, id="large"), pytest.param("x", id="small")])
@pytest.mark.parametrize("status", [400, 413])
def test_a_result_that_is_refused_is_kept(status: int, result: str) -> None:
    # A small result is a part of the stream, too.
    shelf, script = Shelf(), Script(*[200] * (len(result) == 1), status)
    assert deliver_to(shelf, script, result) == [{"output": [result]}, {"output": {"result_path": "/there"}}]


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        pytest.param([404] * FORGOTTEN_ANSWERS, "x" * 1_000_001, id="an unknown job"),
        pytest.param([410] * FORGOTTEN_ANSWERS, "x" * 1_000_001, id="a job that is gone"),
    ],
)
def test_a_result_that_is_refused_for_another_reason_is_not_kept(answers: list[int], part: str) -> None:
    shelf = Shelf()
    assert "RunPod does not accept" in deliver_to(shelf, Script(*answers), part)[-1]["error"]
    assert not shelf.kept


def test_a_job_fails_whose_result_nobody_can_keep() -> None:
    (result,) = deliver_to(Shelf("upload_url: no.", "s3Config: neither."), Script(), "x" * 20_000_001)
    error = json.loads(result["error"])
    assert error["code"] == 413
    assert "It could not be stored elsewhere. upload_url: no. s3Config: neither. A result may" in error["message"]


def test_a_job_fails_if_even_the_place_of_its_result_is_refused() -> None:
    shelf, script = Shelf(), Script(400)
    *_, result = deliver_to(shelf, script, "x" * 20_000_001)
    assert "(HTTP 400)" in result["error"]
    assert len(script.posted("done")) == 2


def test_a_refused_error_is_followed_by_a_short_one() -> None:
    script = Script(400)
    run_on_virtual_clock(Delivery(script.platform(), {"id": "job"}, lambda: None).failed("long"))
    assert script.posted("done")[0] == {"error": "long"}
    assert "(HTTP 400)" in script.posted("done")[1]["error"]


@pytest.mark.parametrize("status", [404, 410])
def test_a_result_of_an_unknown_job_is_refused_after_some_answers(status: int) -> None:
    _, results = Script(200, *[status] * FORGOTTEN_ANSWERS).deliver("a")
    assert results[:-1] == [{"output": ["a"]}] * FORGOTTEN_ANSWERS
    assert f"(HTTP {status})" in results[-1]["error"]


@pytest.mark.parametrize("status", [404, 410])
def test_a_stream_that_the_platform_does_not_know_is_lost_after_some_answers(status: int) -> None:
    script = Script(200, *[status] * 100)
    with pytest.raises(JobLostError, match="does not know it"):
        script.deliver("a", "b", "c")
    assert len(script.posts) == 1 + FORGOTTEN_ANSWERS


def test_one_answer_that_a_job_is_unknown_is_taken_for_a_mistake() -> None:
    parts, results = Script(404, 404, 200).deliver("a")
    assert (len(parts), len(results)) == (3, 1)


def test_the_pauses_are_short_once_the_worker_is_stopped() -> None:
    async def run() -> float:
        stopping, clock = asyncio.Event(), asyncio.get_running_loop().time
        platform = Script(*[AWAY] * 20).platform(stopping)
        posting = asyncio.create_task(platform.done("job", b'{"output":[]}'))
        await asyncio.sleep(60)
        stopping.set()
        began = clock()
        await posting
        return clock() - began

    assert run_on_virtual_clock(run()) < 10


def poll_times(*answers: Any, polls: int = 4, stops: bool = False) -> list[float]:
    """Return the times of long polls that get these answers at once."""
    script = Script(*answers)

    async def run() -> None:
        platform = script.platform()
        for _ in range(polls):
            await (platform.stops() if stops else platform.take(1, False))

    run_on_virtual_clock(run())
    return [at for at, _ in script.polls]


def test_after_429_the_platform_is_asked_again_after_five_seconds() -> None:
    assert poll_times(429, polls=2) == [0.0, 5.0]


@pytest.mark.parametrize("failure", [AWAY, 500, Answer(200, b"<html>"), Answer(200, b'"text"')])
@pytest.mark.parametrize("stops", [True, False])
def test_the_pauses_become_longer_while_polls_fail(failure: Any, stops: bool) -> None:
    times = poll_times(*[failure] * 3, stops=stops)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[0] >= 0.05


def test_the_number_of_jobs_and_whether_the_worker_is_busy_are_in_the_url() -> None:
    script = Script()

    async def run() -> None:
        await script.platform().take(1, False)
        await script.platform().take(3, True)

    run_on_virtual_clock(run())
    assert [url for _, url in script.polls] == [
        "take?&job_in_progress=0",
        "take-batch?&batch_size=3&job_in_progress=1",
    ]


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        pytest.param(b'{"jobsToStop": ["a", 7, "b"]}', ["a", "b"], id="ids"),
        pytest.param(b'{"jobsToStop": []}', [], id="none"),
        pytest.param(b'{"jobsToStop": "a"}', [], id="no list"),
        pytest.param(b"[" * 100_000, [], id="nested too deeply"),
    ],
)
def test_the_ids_of_stopped_jobs(body: bytes, ids: list[str]) -> None:
    assert run_on_virtual_clock(Script(Answer(200, body)).platform().stops()) == ids

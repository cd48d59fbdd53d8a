"""The batches of one schedule: their files on the volume, the lines that the engine is asked, and their invariants."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.simulation.plan import BatchPlan, Plan, RequestPlan, job_of
from tests.support.batches import jsonl
from worker.batch.share import FIFTH, QUIET_SECONDS
from worker.errors import Json

JOURNAL_SECONDS = 0.2
"""How soon after the engine's answer a line's result is in the journal."""
MOMENT = 0.001
"""How far the worker's measurement of a time may differ from the engine's."""
_RESULT = re.compile(rb'\{"id":"batch_req_([a-z]+-\d+)-[0-9a-f]{16}_(\d+)",', re.ASCII)


class Lines:
    """Records which lines the engine is asked and answers."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._batches = plan.batches
        self._timeout = plan.settings["request_timeout"]
        self.volume = folder / "volume"
        self._is_kept = plan.has_volume
        self.violations: list[str] = []
        self._callers: dict[str, float] = {}
        """The requests in the engine that are no lines, and since when."""
        self._last_caller = float("-inf")
        self._asked: set[str] = set()
        """The lines in the engine."""
        self._answered: dict[str, float] = {}
        """The lines that the engine has answered, and when."""
        if plan.has_volume:
            self.volume.mkdir()
            for batch in self._batches.values():
                if batch.is_file:
                    (self.volume / f"{batch.name}.in").write_bytes(jsonl(line.line for line in batch.lines))

    def violated(self, text: str) -> None:
        """Note the violation of an invariant."""
        self.violations.append(f"at {asyncio.get_running_loop().time():.3f} s: {text}")

    def is_kept(self, job_id: str) -> bool:
        """Return whether a job is a batch that another worker can go on with."""
        return self._is_kept and job_id in self._batches

    # ---- Requests to the engine

    @contextmanager
    def request(self, name: str) -> Iterator[None]:
        """Record a request while the block runs."""
        now = asyncio.get_running_loop().time()
        if "/" not in name:
            self._callers[name] = now
        else:
            self._check_line(name, now)
            self._asked.add(name)
        try:
            yield
        finally:
            if self._callers.pop(name, None) is not None:
                self._last_caller = asyncio.get_running_loop().time()
            self._asked.discard(name)

    def answered(self, name: str) -> None:
        """The engine has answered a request."""
        if "/" in name:
            self._answered[name] = asyncio.get_running_loop().time()

    def _check_line(self, name: str, now: float) -> None:
        job_id, _, number = name.partition("/")
        if name in self._answered or int(number) in self._ended(job_id):
            self.violated(f"{name} is asked again, although it has ended")
        if others := {other for other in self._asked if job_of(other) != job_id}:
            self.violated(f"{name} is asked beside lines of another batch: {sorted(others)}")
        callers = sum(since < now for since in self._callers.values())
        is_quiet = not callers and now - self._last_caller >= QUIET_SECONDS - MOMENT
        if not is_quiet and len(self._asked) >= max(callers // FIFTH, 1):
            self.violated(f"{name} is asked beside {len(self._asked)} other lines, while there are other requests")

    # ---- Files

    def _ended(self, job_id: str) -> list[int]:
        """Return the numbers of a batch's lines that have a result on the volume."""
        return [int(number) for owner, number in self._results() if owner == job_id]

    def _results(self) -> Iterator[tuple[str, str]]:
        for path in (*self.volume.rglob("*.jsonl"), *self.volume.rglob("*.part")):
            for owner, number in _RESULT.findall(path.read_bytes()):
                yield owner.decode(), number.decode()

    def run_ended(self, job_id: str, at: float, *, is_cancelled: bool) -> None:
        """A run of a batch has ended, because of something that happened at a time. Check what it has left."""
        for name in [name for name in self._answered if job_of(name) == job_id]:
            if not self._is_kept or self._answered[name] > at - JOURNAL_SECONDS:
                # The line may be asked again.
                del self._answered[name]
        if not self._is_kept:
            return
        ended = self._ended(job_id)
        if len(ended) != len(set(ended)):
            self.violated(f"{job_id} has two results of a line: {sorted(ended)}")
        answered = {name for name in self._answered if job_of(name) == job_id}
        if missing := answered - {f"{job_id}/{number}" for number in ended}:
            self.violated(f"{job_id} has no results of lines that have ended: {sorted(missing)}")
        if is_cancelled and any(job_id in str(path) for path in self.volume.rglob("*.part")):
            self.violated(f"{job_id} was cancelled, and has no output")

    def check_files(self) -> None:
        """Check that every batch has its output, and nothing else is left."""
        paths = [path for path in self.volume.parent.rglob("*") if path.is_file()]
        if left := sorted(path.name for path in paths if path.suffix not in (".in", ".jsonl")):
            self.violated(f"files are left: {left}")

    # ---- Results

    def check_result(self, batch: BatchPlan, result: Json) -> None:
        """Check the output of a batch's job."""
        results = self._read(result)
        names = [str(each["custom_id"]) for each in results]
        expected = [line.name for line in batch.lines]
        if (names if batch.order == "input" else sorted(names)) != expected:
            self.violated(f"the output of {batch.name} has the lines {names}")
            return
        planned = {line.name: line for line in batch.lines}
        wrong = [each["custom_id"] for each in results if not self._is_planned(planned[each["custom_id"]], each)]
        if wrong:
            self.violated(f"{batch.name} has wrong results of {wrong}")
        ok = sum((each["response"] or {}).get("status_code") == 200 for each in results)
        if (result["completed"], result["failed"], result["total"]) != (ok, len(results) - ok, len(results)):
            self.violated(f"the counts of {batch.name} are wrong: {result}")

    def _read(self, result: Json) -> list[Any]:
        if path := result.get("output"):
            return [json.loads(line) for line in Path(path).read_bytes().splitlines()]
        return list(result["results"])

    def _is_planned(self, line: RequestPlan, result: Json) -> bool:
        if line.form == "invalid":
            return result["response"] is None and bool(result["error"]["code"] == "invalid_url")
        status, body = result["response"]["status_code"], result["response"]["body"]
        if self._timeout is not None and status == 504:
            return True
        expected = (200, {"n": line.events}) if line.ending == "complete" else (500, body)
        return (status, body) == expected

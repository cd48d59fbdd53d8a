"""`make simulate`: run schedules in all cores, and print for each violation of an invariant how to replay it."""

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pprint import pformat

from tests.simulation import schedule
from tests.simulation.plan import plan_of

CHUNK = 250
SHOWN = 10
"""After so many violations the rest is not run."""


def main(arguments: Sequence[str]) -> int:
    """Run the schedules; the exit code is 1 if any of them violates an invariant."""
    options = _parse(arguments)
    if options.replay is not None:
        return _replay(options.replay)
    began, found, done = time.monotonic(), 0, 0
    seeds = range(options.first, options.first + options.schedules)
    with multiprocessing.Pool(options.processes, logging.disable) as pool:
        for violation in pool.imap(schedule.first_violation, seeds, CHUNK):
            done += 1
            if violation:
                found += 1
                _print(violation)
            if found >= SHOWN:
                break
    seconds = time.monotonic() - began
    _print(f"{done} schedules (seeds {seeds[0]} to {seeds[0] + done - 1}) in {seconds:.0f} s, {found} with violations")
    return 1 if found else 0


def _replay(seed: int) -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    _print(pformat(plan_of(seed)))
    violations = schedule.run(seed)
    _print("\n".join(violations) or "No violation.")
    return 1 if violations else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=5000, help="how many to run (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one schedule, and print its plan and the log")
    options = parser.parse_args(arguments)
    if options.schedules < 1:
        parser.error("--schedules must be 1 or more")
    return options


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The worker's log lines."""

import logging
import sys


def configure(level: str) -> None:
    """Send the worker's own log lines to stderr, so that stdout holds a local run's result and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)-7s %(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger("worker")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False

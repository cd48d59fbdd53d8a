"""The worker's command, with a worker that has chosen a loader that fails: `python -m tests.support.failing_loader`.

On a CPU the worker never chooses one.
"""

import runpy
import sys
from argparse import Namespace
from typing import Any

from tests.support.tiny import ROOT
from worker import worker
from worker.model.load_format import LoadFormat

FAILING = "fastsafetensors"


class ChoosingWorker(worker.Worker):
    """A worker that chooses the failing loader."""

    def _choose_loader(self, args: Namespace, _gpus: list[Any]) -> LoadFormat:
        args.load_format = FAILING
        return LoadFormat(FAILING, "chosen by a test", may_fall_back=True)


if __name__ == "__main__":
    worker.Worker = ChoosingWorker  # type: ignore[misc]
    sys.argv[0] = str(ROOT / "handler.py")
    runpy.run_path(sys.argv[0], run_name="__main__")

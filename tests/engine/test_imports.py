"""What a worker imports before it forks the engine process. Each module delays the start."""

import json
import subprocess
import sys

from tests.support.tiny import ROOT

PROGRAM = """
import gc, json, sys
gc.disable()
import worker.main
light = [name for name in ("torch", "vllm", "transformers", "openai") if name in sys.modules]
import worker.engine
import torch
heavy = [name for name in ("runpod", "boto3", "matplotlib", "pypdfium2") if name in sys.modules]
print(json.dumps({"light": light, "heavy": heavy, "cuda": torch.cuda.is_initialized(), "gc": gc.isenabled()}))
"""


def test_the_start_imports_nothing_that_can_wait_and_leaves_cuda_and_the_collector_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=110, check=True
    )
    assert json.loads(done.stdout) == {"light": [], "heavy": [], "cuda": False, "gc": False}

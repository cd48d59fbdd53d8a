"""The one room that knows vLLM. Checked against vLLM 0.32.0; tests/test_drift.py names what it leans on."""

from worker.engine.app import Engine
from worker.engine.arguments import near_misses, parse_arguments

__all__ = ["Engine", "near_misses", "parse_arguments"]

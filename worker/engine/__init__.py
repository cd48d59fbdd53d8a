"""The one room that knows vLLM. Checked against vLLM 0.32.0; tests/test_drift.py names what it leans on."""

from worker.engine.app import Engine
from worker.engine.arguments import compiles_alike, parse_arguments, place, plan, remarks

__all__ = ["Engine", "compiles_alike", "parse_arguments", "place", "plan", "remarks"]

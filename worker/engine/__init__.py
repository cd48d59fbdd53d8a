"""The one room that knows vLLM: 0.32, 0.31 and 0.30. tests/project/test_drift.py names what it leans on."""

from worker.engine.arguments import compiles_alike, parse_arguments, place, plan, remarks
from worker.engine.load import Engine

__all__ = ["Engine", "compiles_alike", "parse_arguments", "place", "plan", "remarks"]

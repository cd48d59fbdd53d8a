"""The only package that imports vLLM (0.32, 0.31 or 0.30). tests/project/test_drift.py checks what it relies on."""

from worker.engine.arguments import compile_inputs, parse_arguments, place, plan, remarks
from worker.engine.engine import Engine

__all__ = ["Engine", "compile_inputs", "parse_arguments", "place", "plan", "remarks"]

"""The only package that imports vLLM (0.32, 0.31 or 0.30). tests/project/test_drift.py checks what it relies on."""

from worker.engine.agreement import terms_of
from worker.engine.arguments import parse_arguments, place, plan, remarks
from worker.engine.compiled_code import compile_inputs
from worker.engine.engine import Engine
from worker.engine.headless import Headless
from worker.engine.loaders import choose_loader, start_engine

__all__ = [
    "Engine",
    "Headless",
    "choose_loader",
    "compile_inputs",
    "parse_arguments",
    "place",
    "plan",
    "remarks",
    "start_engine",
    "terms_of",
]

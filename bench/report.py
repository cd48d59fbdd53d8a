"""Writes the medians of a benchmark as a table, as JSON and as a plot."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

FIGURES = [
    "tokens/s",
    "requests/s",
    "TTFT p50 ms",
    "TTFT p95 ms",
    "gap p50 ms",
    "gap p95 ms",
    "CPU s per 1000 tokens",
    "memory MB",
    "POSTs per token",
]


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table of all figures, with their ratios to those of the first server."""
    names = list(result["cells"][0])
    lines = [f"| concurrency | mode | figure | {' | '.join(names)} |", "| --- " * (3 + len(names)) + "|"]
    for cell in result["cells"]:
        first = cell[names[0]]
        for figure in FIGURES:
            if figure in first:
                values = " | ".join(_value(cell[name][figure], first[figure]) for name in names)
                lines.append(f"| {first['concurrency']} | {first['mode']} | {figure} | {values} |")
    return "\n".join(lines) + "\n"


def _value(value: float, reference: float) -> str:
    return f"{value:.4g} ({value / reference:.2f})" if reference else f"{value:.3g}"


def write(result: dict[str, Any], path: Path) -> None:
    """Write the results to `path` with the extensions .json, .md and .svg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(_page(result))
    _plot(result["cells"], path.with_suffix(".svg"))


def _page(result: dict[str, Any]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return (
        f"Medians over the rounds of `{result['command']}`, in which the servers took turns ({machine}). The ratio to "
        f"`vllm serve` is in brackets. CPU time and memory are those of the server without the processes of the model "
        f"and of RunPod's stand-in. A gap is the time between two arrivals of new text.\n\n{table(result)}"
    )


def _plot(cells: list[dict[str, dict[str, Any]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    shown = [("tokens/s", "streaming"), ("tokens/s", "not streaming"), ("TTFT p95 ms", "streaming")]
    for axis, (name, mode) in zip(axes, shown, strict=True):
        for server in cells[0]:
            points = [cell[server] for cell in cells if cell[server]["mode"] == mode]
            axis.plot([point["concurrency"] for point in points], [point[name] for point in points], "o-", label=server)
        axis.set(xscale="log", yscale="log", xlabel="concurrent requests", title=f"{name}, {mode}")
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})

"""Chooses the library that loads a model's weights (vLLM's `--load-format`) when LOAD_FORMAT is `auto`.

Pure: `worker.engine.loaders` collects the facts. Nothing here was measured on a GPU. The order follows from what the
libraries do (vllm/model_executor/model_loader/weight_utils.py) and from published figures (docs/models.md):

- `instanttensor` reads with direct I/O, past the page cache, and needs little GPU memory.
- `fastsafetensors` keeps whole files in GPU memory while it loads.
- `runai_streamer` reads many parts of files at once into the machine's memory. Each GPU's process reads all files.
"""

from dataclasses import dataclass

AUTO = "auto"
PACKAGES = {
    "instanttensor": "instanttensor",
    "fastsafetensors": "fastsafetensors",
    "runai_streamer": "runai-model-streamer",
}
"""The package that each loader needs."""
LOCAL = ("instanttensor", "fastsafetensors", "runai_streamer")
"""The loaders for a local disk, the first choice first."""
NETWORK = ("runai_streamer", "fastsafetensors")
"""The loaders for a network file system, where direct I/O may be impossible."""
SMALL_BYTES = 2_000_000_000
"""Weights for which another loader is not worth its own start."""
CACHED_SHARE = 0.5
"""The share of weights in the page cache from which vLLM's own loader, which reads from there, is used."""
FILES_AT_ONCE = 2
"""Files that `fastsafetensors` may have in GPU memory besides the weights: the one that it copies, and the next one."""


@dataclass(frozen=True, slots=True)
class LoadFormat:
    """The value for `--load-format`, and why."""

    name: str
    reason: str
    may_fall_back: bool = False
    """Whether the worker chose a library that may fail. Otherwise the user chose, or it is vLLM's own loader."""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of a model's weights."""

    total: int
    """Bytes of all files."""
    largest: int
    """Bytes of the largest file."""
    cached: float
    """The share that is in the page cache, between 0 and 1."""
    is_network: bool
    """Whether they lie on a network file system."""
    has_other_files: bool
    """Whether the folder has `.safetensors` files that the model does not use. `runai_streamer` would load them too."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that loads the weights."""

    installed: frozenset[str]
    """The loaders whose packages are installed."""
    gpus: int
    """The GPUs that share the weights."""
    gpu_memory: int
    """Bytes of memory that are free on each of them."""
    memory: int
    """Bytes that the container may still use, including the page cache."""


def choose(weights: Weights, machine: Machine) -> LoadFormat:
    """Return the loader for `.safetensors` files and NVIDIA GPUs."""
    if not machine.installed:
        return LoadFormat(AUTO, "no other loader is installed")
    if weights.total < SMALL_BYTES:
        return LoadFormat(AUTO, f"the weights have only {weights.total / 1e9:.1f} GB")
    if weights.cached >= CACHED_SHARE:
        return LoadFormat(AUTO, f"{weights.cached:.0%} of the weights are in memory already")
    place, order = ("a network file system", NETWORK) if weights.is_network else ("a local disk", LOCAL)
    usable = [name for name in order if name in machine.installed and _fits(name, weights, machine)]
    if not usable:
        return LoadFormat(AUTO, f"none of the installed loaders ({', '.join(sorted(machine.installed))}) fits")
    reason = f"{weights.total / 1e9:.1f} GB on {place}, {weights.cached:.0%} of them in memory"
    return LoadFormat(usable[0], reason, may_fall_back=True)


def _fits(name: str, weights: Weights, machine: Machine) -> bool:
    """Return whether a loader has the memory that it needs, and would load the right files."""
    if name == "fastsafetensors":
        return weights.total / machine.gpus + FILES_AT_ONCE * weights.largest <= machine.gpu_memory
    if name == "runai_streamer":
        return weights.total * machine.gpus <= machine.memory and not weights.has_other_files
    return True

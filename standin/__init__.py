"""A local stand-in for RunPod's queue platform, over real sockets. See standin/README.md.

`Platform` holds the state of one endpoint, `create_app` adds the HTTP routes, and `StandinServer` serves them on
127.0.0.1. `worker_environment` returns the variables that RunPod sets in a worker's container. `Behaviour` selects
variants of the platform's behaviour, and `Fault` describes one injected fault.
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

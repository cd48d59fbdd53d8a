"""Settings: read once from the environment, a file and presets, then frozen and passed on as one object."""

from worker.settings.reading import read, read_or_report
from worker.settings.settings import Settings

__all__ = ["Settings", "read", "read_or_report"]

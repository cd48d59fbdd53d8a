"""Settings: read once from the environment, a file and presets, then frozen and passed on as one object."""

from worker.settings.settings import Settings, read, read_or_report

__all__ = ["Settings", "read", "read_or_report"]

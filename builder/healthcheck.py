"""Docker's HEALTHCHECK: asks `/ping` on the worker's port. A worker that opens no port counts as healthy."""

import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from worker.errors import ConfigurationError
from worker.settings import environment, read_or_report


def main() -> int:
    """Return 0 if the worker is ready or loading its model."""
    try:
        settings, _ = read_or_report(environment.read())
        if not settings.ports:
            return 0
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.ports[-1]}/ping", timeout=5) as response:
            return int(response.status not in (200, 204))
    except (ConfigurationError, urllib.error.URLError, OSError):
        return 1


if __name__ == "__main__":
    sys.exit(main())

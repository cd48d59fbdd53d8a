"""Docker's HEALTHCHECK: asks `/ping` on the worker's port; one of the queue that listens nowhere counts as healthy."""

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    """Return 0 if the worker is well, or is loading its model."""
    port = os.environ.get("PORT_HEALTH") or os.environ.get("METRICS_PORT") or os.environ.get("PORT")
    if not port:
        return 0
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{int(port)}/ping", timeout=5) as answer:
            return int(answer.status not in (200, 204))
    except (urllib.error.URLError, OSError, ValueError):
        return 1


if __name__ == "__main__":
    sys.exit(main())

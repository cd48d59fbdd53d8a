"""Docker's HEALTHCHECK: asks `/ping` on the port that the worker's settings name.

The exit code is 0 if the worker is ready, or if its mode opens no port. It is 1 while the model is being loaded: Docker
ignores failures until the start period ends, and shows the container as `starting`.
"""

import http.client
import ipaddress
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from worker.errors import ConfigurationError
from worker.settings import Settings, environment, read_or_report

RESULTS = {200: "The worker is ready.", 204: "The worker is loading the model."}


def main() -> int:
    """Print the result, which `docker inspect` shows, and return the exit code."""
    try:
        settings, _ = read_or_report(environment.read())
        if not settings.ports:
            return 0
        status = ping(settings)
    except (ConfigurationError, OSError, http.client.HTTPException) as error:
        sys.stdout.write(f"The worker does not answer: {type(error).__name__}\n")
        return 1
    sys.stdout.write(f"{RESULTS.get(status, f'The worker is not healthy: status {status}.')}\n")
    return int(status != 200)


def ping(settings: Settings) -> int:
    """Return the status of `/ping` on the worker's first port."""
    connection = http.client.HTTPConnection(address(settings.host), settings.ports[0], timeout=5)
    connection.request("GET", "/ping", headers={"Host": settings.allowed_hosts[0]})
    return connection.getresponse().status


def address(host: str) -> str:
    """Return the address at which a server that listens on `host` can be reached from the same container."""
    try:
        listens_on = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not listens_on.is_unspecified:
        return host
    return "127.0.0.1" if listens_on.version == 4 else "::1"


if __name__ == "__main__":
    sys.exit(main())

"""The rights of the container: compose.yaml, and the entry point with the real `setpriv`."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny import ROOT

ENTRYPOINT = ROOT / "builder/entrypoint.sh"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
AS_ROOT: list[str] = []
AS_IN_COMPOSE = ["setpriv", "--no-new-privs", "--bounding-set=-all,+setuid,+setgid,+net_bind_service"]
AS_ANOTHER_USER = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]


@pytest.mark.parametrize("name", SERVICES)
def test_services_listen_on_this_machine_only_and_have_few_rights(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["cap_drop"] == ["ALL"]
    assert {"ipc", "privileged", "network_mode", "pid"}.isdisjoint(service)


def start(folder: Path, prefix: list[str], **environ: str) -> tuple[list[str], str]:
    """Run the entry point and return the lines of the fake `python3`, and stderr.

    The user `nobody` takes the place of `worker`, which exists in the image only.
    """
    tools = folder / "bin"
    tools.mkdir()
    scripts = {
        "python3": 'id -u; grep -E "NoNewPrivs|CapEff" /proc/self/status; echo "$HOME $VLLM_CACHE_ROOT $*"',
        "setpriv": f'exec {shutil.which("setpriv")} $(echo "$@" | sed \'s/reuid=worker/reuid=65534/; '
        "s/regid=worker/regid=65534/; s/--init-groups/--clear-groups/')",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    for path in (folder, *folder.parents):
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o011)
    done = subprocess.run(
        [*prefix, "/bin/sh", str(ENTRYPOINT), "--check"],
        env={"PATH": f"{tools}:/usr/bin:/bin", "BASE_PATH": "/no/volume", **environ},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


@NEEDS_ROOT
@pytest.mark.parametrize("prefix", [AS_ROOT, AS_IN_COMPOSE], ids=["docker run", "docker compose"])
def test_the_worker_runs_without_root_and_may_open_low_ports(tmp_path: Path, prefix: list[str]) -> None:
    (user, capabilities, no_new_privileges, rest), errors = start(tmp_path, prefix)
    assert (user, errors) == ("65534", "")
    assert int(capabilities.split()[1], 16) == 1 << 10
    assert no_new_privileges.split()[1] == "1"
    assert rest.split() == ["/home/worker", "-u", "handler.py", "--check"]


@NEEDS_ROOT
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        pytest.param("RUN_AS_ROOT", "RUN_AS_ROOT is set", id="by setting"),
        pytest.param("BASE_PATH", "only root may write to ", id="network volume"),
        pytest.param("DOWNLOAD_DIR", "only root may write to ", id="folder for downloads"),
    ],
)
def test_a_worker_that_runs_as_root_says_why(tmp_path: Path, setting: str, message: str) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    lines, errors = start(tmp_path, AS_ROOT, **{setting: "true" if setting == "RUN_AS_ROOT" else str(private)})
    assert lines[0] == "0"
    assert errors.startswith(f"Running as root: {message}")


@NEEDS_ROOT
def test_another_user_gets_folders_that_it_can_write_to(tmp_path: Path) -> None:
    lines, errors = start(tmp_path, AS_ANOTHER_USER, HOME="/", VLLM_CACHE_ROOT="/var/cache/no")
    assert (lines[0], lines[-1], errors) == ("1234", "/tmp /tmp/vllm -u handler.py --check", "")

"""compose.yaml: which services each combination of profiles starts, and what each service gets."""

import re
import subprocess
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny import ROOT
from worker import __version__
from worker.cluster.role import Role

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
CLUSTER = ROOT / "deploy/cluster/compose.yaml"
PROFILES = sorted({profile for service in SERVICES.values() for profile in service.get("profiles", [])})
COMBINATIONS = list(chain.from_iterable(combinations(PROFILES, count) for count in range(1, len(PROFILES) + 1)))


def started(profiles: tuple[str, ...]) -> set[str]:
    """Return the services that Compose starts: those without a profile, and those with an active one.

    Source: https://docs.docker.com/reference/compose-file/profiles/
    """
    services = SERVICES.items()
    return {name for name, each in services if not each.get("profiles") or set(each["profiles"]) & set(profiles)}


def names(service: str) -> list[str]:
    """Return all names by which other services reach a service."""
    networks = SERVICES[service].get("networks", {})
    aliases = [alias for network in networks.values() for alias in (network or {}).get("aliases", [])]
    return [service, *aliases, *filter(None, [SERVICES[service].get("container_name")])]


def environment(service: str) -> dict[str, str | None]:
    """Return the variables of a service. None: the variable keeps the value in the shell or in .env."""
    variables = SERVICES[service].get("environment", {})
    return dict.fromkeys(variables) if isinstance(variables, list) else variables


@pytest.mark.parametrize("profiles", COMBINATIONS, ids=" and ".join)
def test_services_of_combined_profiles_do_not_collide(profiles: tuple[str, ...]) -> None:
    services = sorted(started(profiles))
    ports = [port.rsplit(":", 1)[0] for name in services for port in SERVICES[name].get("ports", [])]
    assert ports
    assert len(ports) == len(set(ports))
    all_names = [name for service in services for name in names(service)]
    assert len(all_names) == len(set(all_names))


@pytest.mark.parametrize(
    ("profiles", "services"),
    [
        pytest.param(("gpu",), {"worker"}, id="GPU"),
        pytest.param(("cpu",), {"worker-cpu"}, id="CPU only"),
        pytest.param(("gpu", "monitoring"), {"worker", "prometheus", "grafana"}, id="GPU and monitoring"),
        pytest.param(("cpu", "monitoring"), {"worker-cpu", "prometheus", "grafana"}, id="CPU and monitoring"),
    ],
)
def test_profiles_start_their_services_only(profiles: tuple[str, ...], services: set[str]) -> None:
    assert started(profiles) == services


def test_the_profile_is_gpu_unless_another_is_chosen() -> None:
    # Compose reads COMPOSE_PROFILES from .env, and `--profile` replaces it.
    assert re.search("^COMPOSE_PROFILES=gpu$", (ROOT / ".env.example").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", SERVICES)
def test_services_listen_on_this_machine_only_and_have_few_rights(name: str) -> None:
    service = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["cap_drop"] == ["ALL"]
    assert {"ipc", "privileged", "network_mode", "pid"}.isdisjoint(service)


def test_the_worker_gets_all_settings_of_the_file() -> None:
    assert SERVICES["worker"]["env_file"] == [{"path": ".env", "required": False}]
    fixed = {name for name, value in environment("worker").items() if value is not None}
    assert fixed == {"WORKER_MODE", "HOST", "PORT", "BASE_PATH"}
    assert SERVICES["worker"]["ports"] == [f"127.0.0.1:8000:{environment('worker')['PORT']}"]
    assert SERVICES["worker"]["volumes"] == [f"data:{environment('worker')['BASE_PATH']}"]


@pytest.mark.parametrize("name", ["worker", "worker-cpu", "prometheus"])
def test_workers_and_their_scraper_get_the_key(name: str) -> None:
    assert environment(name)["WORKER_API_KEY"] is None
    assert "WORKER_API_KEY" in environment(name)


def test_the_image_is_that_of_this_release() -> None:
    name = SERVICES["worker"]["image"].replace("${IMAGE:-runpod-vllm-worker}", "runpod-vllm-worker")
    assert name == f"runpod-vllm-worker:{__version__}"


def test_the_node_of_a_cluster_is_the_worker_on_the_network_of_its_machine() -> None:
    node, worker = yaml.safe_load(CLUSTER.read_text())["services"]["worker"], SERVICES["worker"]
    assert node["image"] == f"${{IMAGE:-ghcr.io/OWNER/runpod-vllm-worker}}:{__version__}"
    assert (node["network_mode"], node["restart"]) == ("host", "unless-stopped")
    same = ("cap_add", "cap_drop", "deploy", "security_opt", "shm_size", "stop_grace_period", "volumes")
    assert {name: node[name] for name in same} == {name: worker[name] for name in same}
    page = (ROOT / "docs/distributed.md").read_text()
    (example,) = re.findall(r"^ *```sh\n( *IMAGE=.*?)```$", page, re.MULTILINE | re.DOTALL)
    variables = dict(line.strip().split("=", 1) for line in example.strip().splitlines())
    assert Role.of(variables) == Role(0, 2, "10.0.0.1", address=None, gpus=None, port=29501)
    assert set(variables) <= set(re.findall("[A-Z_]{4,}", CLUSTER.read_text()))


def test_prometheus_scrapes_every_worker() -> None:
    (job,) = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text())["scrape_configs"]
    (lookup,) = job["dns_sd_configs"]
    workers = {name for name, service in SERVICES.items() if "build" in service}
    assert (set(lookup["names"]), lookup["port"]) == (workers, 8000)
    assert all(port.endswith(":8000") for name in workers for port in SERVICES[name]["ports"])


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        pytest.param({"WORKER_API_KEY": "one"}, "one", id="one key"),
        pytest.param({"WORKER_API_KEY": "one,two"}, "one", id="the first of two keys"),
        pytest.param({}, "", id="no key"),
    ],
)
def test_prometheus_gets_the_key_in_a_file(environ: dict[str, str], key: str, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text())
    path = config["scrape_configs"][0]["authorization"]["credentials_file"]
    (command,) = SERVICES["prometheus"]["command"]
    # Compose replaces $$ by $.
    script = command.replace("$$", "$").replace(path, str(tmp_path / "key")).replace("/bin/prometheus", "echo")
    shell = [*SERVICES["prometheus"]["entrypoint"], script]
    done = subprocess.run(shell, env={"PATH": "/usr/bin:/bin", **environ}, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "--config.file=/etc/prometheus/prometheus.yml"
    assert (tmp_path / "key").read_text() == key
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    assert Path(path).parent.as_posix() in SERVICES["prometheus"]["tmpfs"]

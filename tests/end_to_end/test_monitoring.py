"""The dashboard and the alerts use only metrics that the worker exports."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import API_KEY, HttpWorker
from tests.support.media import image_url
from tests.support.ports import free_port
from tests.support.tiny import ROOT
from worker.telemetry.gpu import GpuCollector

FOLDER = ROOT / "deploy/monitoring"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="`make monitoring` downloads Prometheus"
)


class Nvml:
    """A fake of NVML with two GPUs."""

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(used=10 * (device + 1), total=100)

    def nvmlDeviceGetUtilizationRates(self, _device: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=25)


def gpu_metrics() -> str:
    registry = CollectorRegistry()
    registry.register(GpuCollector(Nvml()))
    return generate_latest(registry).decode()


def test_the_gpu_metrics_have_a_sample_for_each_gpu() -> None:
    text = gpu_metrics()
    assert 'worker_gpu_memory_used_bytes{gpu="1"} 20.0' in text
    assert 'worker_gpu_memory_total_bytes{gpu="0"} 100.0' in text
    assert 'worker_gpu_utilization_ratio{gpu="0"} 0.25' in text


def expressions() -> list[str]:
    panels = json.loads((FOLDER / "grafana/dashboards/worker.json").read_text())["panels"]
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    dashboard = [target["expr"] for panel in panels for target in panel["targets"]]
    return dashboard + [rule["expr"] for group in groups for rule in group["rules"]]


def exported(http_worker: HttpWorker) -> set[str]:
    """Return the names of all samples after a streaming job, one without streaming, and a failed one."""
    with http_worker.client() as http:
        content = [{"type": "image_url", "image_url": {"url": image_url("red")}}, {"type": "text", "text": "What?"}]
        variants: list[dict[str, Any]] = [{}, {"stream": True}, {"messages": []}]
        for fields in variants:
            body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
            http.post("/v1/chat/completions", json=body | fields)
        text = http.get("/metrics").text
    families = [*text_string_to_metric_families(text), *text_string_to_metric_families(gpu_metrics())]
    # A counter with labels has no sample before the first event.
    declared = {f"{family.name}_total" for family in families if family.type == "counter"}
    return declared | {sample.name for family in families for sample in family.samples}


def test_the_worker_exports_every_metric_of_dashboard_and_alerts(http_worker: HttpWorker) -> None:
    used = {name for text in expressions() for name in re.findall(r"(?:worker_|vllm:)[a-z0-9_]+", text)}
    assert len(used) > 15
    assert used - exported(http_worker) == set()


def test_every_alert_has_a_summary_and_a_severity() -> None:
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"]["summary"].endswith(".")
            assert rule["labels"]["severity"] in ("warning", "critical")


def test_compose_mounts_existing_folders() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    mounts = [mount.split(":")[0] for service in services for mount in service.get("volumes", []) if mount[0] == "."]
    assert len(mounts) == 3
    assert all((ROOT / mount).is_dir() for mount in mounts)


@needs_prometheus
def test_prometheus_accepts_the_rules_and_scrapes_the_worker(http_worker: HttpWorker, tmp_path: Path) -> None:
    subprocess.run(["promtool", "check", "config", "--syntax-only", FOLDER / "prometheus.yml"], check=True)
    subprocess.run(["promtool", "check", "rules", FOLDER / "alerts.yml"], check=True)
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{http_worker.port}"]}]
    job["authorization"] = {"credentials": API_KEY}
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text())
    port = free_port()
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"]) as prometheus:
        try:
            assert _value(port, "worker_ready") == "1"
            # Prometheus can evaluate every expression.
            for expression in expressions():
                query = expression.replace("$__rate_interval", "1m")
                answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query})
                assert answer.json()["status"] == "success", answer.text
            rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
            assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
        finally:
            prometheus.terminate()


def _value(port: int, query: str) -> str:
    """Return the value of a query as soon as it has a result."""
    for _ in range(100):
        time.sleep(0.2)
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}).json()
        except httpx.TransportError:
            continue
        if result := answer["data"]["result"]:
            return str(result[0]["value"][1])
    pytest.fail("Prometheus did not scrape the worker within 20 s")

"""The durations of the phases of the start."""

import logging

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from worker.telemetry.startup_phases import StartupPhases


def test_a_phase_is_logged_and_kept_as_a_metric(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    phases = StartupPhases(registry)
    with caplog.at_level(logging.INFO), phases.phase("imports"):
        pass
    phases.add("engine", 12.3456)
    assert list(phases.seconds) == ["imports", "engine"]
    assert phases.seconds["engine"] == 12.346
    assert 'worker_startup_seconds{phase="engine"} 12.3456' in generate_latest(registry).decode()
    assert vars(caplog.records[0])["phase"] == "imports"


def test_a_phase_that_fails_is_kept_too() -> None:
    phases = StartupPhases(CollectorRegistry())
    with pytest.raises(LookupError), phases.phase("engine"):
        raise LookupError
    assert "engine" in phases.seconds


def test_the_report_has_all_phases_and_details_of_the_start(caplog: pytest.LogCaptureFixture) -> None:
    phases = StartupPhases(CollectorRegistry())
    phases.add("total", 2.5)
    with caplog.at_level(logging.INFO):
        phases.report(weights="on disk")
    line = vars(caplog.records[-1])
    assert (line["message"], line["startup_seconds"], line["weights"]) == (
        "Ready after 2.500 s",
        {"total": 2.5},
        "on disk",
    )

"""The seconds of the start."""

import logging

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from worker.telemetry.startup_phases import Ledger


def test_a_phase_is_told_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    ledger = Ledger(registry)
    with caplog.at_level(logging.INFO), ledger.phase("imports"):
        pass
    ledger.enter("engine", 12.3456)
    assert list(ledger.seconds) == ["imports", "engine"]
    assert ledger.seconds["engine"] == 12.346
    assert 'worker_startup_seconds{phase="engine"} 12.3456' in generate_latest(registry).decode()
    assert vars(caplog.records[0])["phase"] == "imports"


def test_a_phase_that_fails_is_kept_too() -> None:
    ledger = Ledger(CollectorRegistry())
    with pytest.raises(LookupError), ledger.phase("engine"):
        raise LookupError
    assert "engine" in ledger.seconds

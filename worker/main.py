"""The worker's program: read the settings, choose a mode, run it.

Heavy modules are imported only when the steps before have succeeded, so that a mistake is reported within a second.
"""

import argparse
import json
import logging.config
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from worker import batch_mode, check, modes, processes, redaction
from worker.errors import StartupError
from worker.follower_mode import FollowerMode
from worker.settings import Settings, environment, read_or_report
from worker.telemetry import logs
from worker.worker import Worker


def main() -> int:
    """Run the worker until it is stopped, or one local job, or check the settings; return the exit code."""
    options = read_options(sys.argv[1:])
    processes.adopt_orphans()
    try:
        if options.check:
            return check.run(environment.read(), options.json)
        with tempfile.TemporaryDirectory(prefix="worker-", ignore_cleanup_errors=True) as folder:
            return start(options, Path(folder))
    except StartupError as error:
        return report(error)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)


def read_options(argv: list[str]) -> argparse.Namespace:
    """Read the worker's options, and those of the SDK that choose a mode. The SDK reads its own options again."""
    parser = argparse.ArgumentParser(
        description="Runs the worker. Its settings are environment variables.", allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="print the effective settings, or all mistakes in them")
    parser.add_argument("--json", action="store_true", help="with --check: print JSON")
    parser.add_argument("--test_input", metavar="JSON", help="answer this job, print the result, and exit")
    batch = "answer a file of requests in OpenAI's batch format (also gzip or zstd), and exit; go on with a stopped one"
    parser.add_argument("--batch", metavar="IN.jsonl", type=Path, help=batch)
    parser.add_argument("--out", metavar="OUT.jsonl", type=Path, help="with --batch: the file for the results")
    parser.add_argument("--rp_serve_api", action="store_true", help="run the RunPod SDK's test server")
    options, others = parser.parse_known_args(argv)
    if (options.batch is None) != (options.out is None):
        parser.error("--batch and --out belong together: --batch IN.jsonl --out OUT.jsonl")
    if unknown := [name for name in others if name.startswith("--") and not name.startswith("--rp_")]:
        sys.stderr.write(f"Unknown options are ignored: {', '.join(unknown)}. --help prints the worker's.\n")
    return options


def start(options: argparse.Namespace, folder: Path) -> int:
    """Read the settings, choose a mode and run it. `folder` is for temporary files."""
    settings, problem = read_or_report(environment.read())
    if options.test_input is not None or options.rp_serve_api or options.batch:
        settings = settings.model_copy(update={"worker_mode": "local"})
    configure(settings, folder)
    try:
        return modes.run(choose(options, Worker(settings, folder / "cause.txt")), problem)
    except StartupError as error:
        return report(error, settings.variables.secrets)


def report(error: StartupError, secrets: Iterable[str] = ()) -> int:
    """Print the error without the secrets; return the exit code."""
    sys.stderr.write(f"{redaction.remover(secrets)(str(error))}\n")
    return error.exit_code


def choose(options: argparse.Namespace, worker: Worker) -> modes.Mode:
    """Return the mode that the options and the settings ask for."""
    if worker.settings.is_follower:
        return FollowerMode(worker)
    if options.batch:
        return batch_mode.BatchMode(worker, options.batch, options.out)
    if options.rp_serve_api and options.test_input is None:
        return modes.DevelopmentMode(worker)
    match worker.settings.mode:
        case "queue":
            return modes.QueueMode(worker)
        case "http":
            return modes.HttpMode(worker)
        case "local":
            return modes.LocalMode(worker, options.test_input)


def configure(settings: Settings, folder: Path) -> None:
    """Set up logging in one format, also in vLLM's processes, and the environment of all libraries."""
    form = (settings.log_format, settings.log_level, settings.vllm_logging_level, settings.log_prompts)
    secrets = settings.variables.secrets
    logging.config.dictConfig(logs.configuration(*form, secrets=secrets))
    logging.captureWarnings(capture=True)
    file = folder / "logging.json"
    # Only this user can read the folder. The file contains the secrets that vLLM's processes remove from their log.
    file.write_text(json.dumps(logs.configuration(*form, cause=folder / "cause.txt", secrets=secrets)))
    environment.prepare(settings, file)
    log = logging.getLogger("worker")
    for warning in settings.variables.warnings:
        log.warning(warning)
    if settings.log_prompts:
        log.warning("LOG_PROMPTS is set: prompts and completions are written to this log")

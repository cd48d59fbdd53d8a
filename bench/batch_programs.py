"""The two programs that `bench.batch` compares: each loads its engine once, then answers one file after another.

`python -m bench.batch_programs worker` runs this worker's batches, `… vllm FLAGS` those of `vllm run-batch`. A line of
the standard input has the paths of an input and of an output. The answer is a line with the seconds that it took.
"""

import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

MARK = "bench.batch: "
"""The beginning of an answer. Libraries write to the standard output, too."""

Answer = Callable[[Path, Path], Awaitable[object]]


async def serve(answer: Answer) -> None:
    """Answer the files that the standard input names."""
    write("ready")
    while text := await asyncio.to_thread(sys.stdin.readline):
        source, output = map(Path, text.split())
        began = time.perf_counter()
        await answer(source, output)
        write(str(time.perf_counter() - began))


def write(text: str) -> None:
    """Write one answer."""
    sys.stdout.write(f"{MARK}{text}\n")
    sys.stdout.flush()


def worker() -> None:
    """Run this worker's batches, as `handler.py --batch` does."""
    from worker import modes
    from worker.batch.files import Files
    from worker.batch.job import Batch
    from worker.batch.spec import BatchSpec
    from worker.main import configure
    from worker.settings import environment, read_or_report
    from worker.worker import Worker

    settings, _ = read_or_report(environment.read())
    settings = settings.model_copy(update={"worker_mode": "local"})

    async def main(loaded: Worker) -> None:
        shared = modes.shared_by_batches(loaded, await loaded.attach())

        async def answer(source: Path, output: Path) -> None:
            spec = BatchSpec(input=str(source), output=str(output))
            await Batch(output.stem, spec, shared, Files(output.stem, "path", source, output)).run()

        await serve(answer)

    with tempfile.TemporaryDirectory() as folder:
        configure(settings, Path(folder))
        loaded = Worker(settings, Path(folder) / "cause.txt")
        try:
            loaded.load()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(main(loaded))
        finally:
            loaded.shutdown()


def vllm(flags: list[str]) -> None:
    """Run vLLM's batches, as `vllm run-batch` does."""
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.run_batch import make_arg_parser, run_batch
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    async def main() -> None:
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["-i", "", "-o", "", *flags])
        async with build_async_engine_client(args, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as engine:

            async def answer(source: Path, output: Path) -> None:
                args.input_file, args.output_file = str(source), str(output)
                await run_batch(engine, args)

            await serve(answer)

    asyncio.run(main())


if __name__ == "__main__":
    vllm(sys.argv[2:]) if sys.argv[1] == "vllm" else worker()

"""RunPod's entry point: prepares this process for a fast start, and runs the worker (worker/main.py).

In the queue's mode the worker ends in `runpod.serverless.start({"handler": …})`, in worker/queue/sdk.py.
"""

import gc
import logging
import sys
from contextlib import suppress

from worker import readahead

if __name__ == "__main__":
    # Imports create a million objects, which stay. Looking for garbage among them takes a quarter of the CPU time of a
    # start (docs/benchmarks/profile.md). `Engine.load` enables this again.
    gc.disable()
    readahead.start()
    from worker import processes
    from worker.main import main

    code = 1
    try:
        code = main()
    except SystemExit as error:
        # A signal while the model is loaded.
        code = processes.code_of(error)
    except Exception:
        logging.getLogger("worker").exception("The worker has failed")
    for stream in (sys.stdout, sys.stderr):
        # Whoever read them may have ended.
        with suppress(OSError):
            stream.flush()
    # Threads that hang must not keep the process alive.
    processes.exit_now(code)
elif __name__ == "__mp_main__":
    # A process that vLLM has spawned. A forked one inherits this.
    from worker import processes

    processes.end_with_parent()

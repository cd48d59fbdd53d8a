"""A thread with an event loop neither delays forks nor leaves anything in the child."""

import json
import subprocess
import sys
import textwrap

from tests.support.tiny import ROOT

PROGRAM = """
    import asyncio, gc, json, os, socket, threading, time
    import psutil
    from worker.forks import PausedInForks

    def child_sockets():
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writing, str(len(psutil.Process().net_connections("inet"))).encode())
            os._exit(0)
        os.waitpid(child, 0)
        return int(os.read(reading, 10))

    async def fork_in_the_loop():
        return child_sockets()

    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
    loop = runner.get_loop()
    thread = threading.Thread(target=loop.run_forever)
    paused = PausedInForks(thread, loop)
    listener = socket.create_server(("127.0.0.1", 0))
    began = time.monotonic()
    before = child_sockets()
    thread.start()
    during = [child_sockets() for _ in range(5)]
    within = asyncio.run_coroutine_threadsafe(fork_in_the_loop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    runner.close()
    ended = child_sockets()
    del paused
    gc.collect()
    gone = child_sockets()
    seconds = time.monotonic() - began
    print(json.dumps({"counts": [before, *during, within, ended, gone], "seconds": seconds}))
"""


def test_forks_pause_the_loop_and_children_have_no_sockets_while_the_object_exists() -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    result = json.loads(done.stdout)
    assert result["counts"] == [0, 0, 0, 0, 0, 0, 0, 0, 1]
    # Without a pause of 5 s, which is what a fork would wait for at most.
    assert result["seconds"] < 4

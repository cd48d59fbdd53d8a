"""`make cluster-demo`: two machines as a cluster, which answers a question about an image. Then one machine is lost."""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.machines import Machine, codes_within, joined_machines
from tests.support.media import image_url
from tests.support.namespaces import obstacle

SETTINGS = {"TENSOR_PARALLEL_SIZE": "2", "CLUSTER_KEY": "any text"}
LOGGERS = ("worker.cluster.", "worker.worker")
"""Their lines are shown."""
END_SECONDS = 30


def main() -> int:
    """Run the demonstration. The exit code is 0 if the answer is right and both workers end as they should."""
    if (reason := obstacle()) is not None:
        sys.stderr.write(f"{reason} Run: sudo make cluster-demo\n")
        return 1
    say("Two machines, each a network namespace with one CPU core, start a worker. This takes half a minute.")
    with (
        tempfile.TemporaryDirectory() as folder,
        joined_machines(Path(folder), SETTINGS) as machines,
    ):
        nodes = [Shown(machines.start(rank)) for rank in (0, 1)]
        for node in nodes:
            wait_until_ready(node, nodes)
        say("The head is asked for the colour of a red image:")
        answer = ask(nodes[0].machine)
        say(answer)
        say("The worker on node 1 is killed.")
        began = time.monotonic()
        nodes[1].machine.send(signal.SIGKILL)
        codes = codes_within(END_SECONDS, *(node.machine for node in nodes))
        seconds = time.monotonic() - began
        for node, code in zip(nodes, codes, strict=True):
            node.show()
            node.say(f"ended with code {code}")
        say(f"Both had ended {seconds:.1f} s later. A supervisor would start them again.")
    return 0 if answer == "The image is red." and codes == [1, 128 + signal.SIGKILL] else 1


class Shown:
    """A machine, and how much of its log has been shown."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._lines = 0

    def show(self) -> None:
        """Print the important lines that the worker has written since the last call."""
        # The last line may not be complete yet.
        lines = self.machine.log.split("\n")[:-1]
        for message in important(lines[self._lines :]):
            self.say(message)
        self._lines = len(lines)

    def say(self, text: str) -> None:
        """Print a line about this machine."""
        say(f"node {self.machine.rank} | {text}")


def wait_until_ready(node: Shown, nodes: list[Shown]) -> None:
    """Wait until a worker is ready, and show the logs of all."""
    while not node.machine.is_ready():
        for each in nodes:
            each.show()
        time.sleep(0.2)
    node.say("is ready")


def important(lines: list[str]) -> Iterator[str]:
    """Yield the messages that are about the cluster."""
    for line in lines:
        entry = json.loads(line) if line.startswith("{") else {}
        if str(entry.get("logger")).startswith(LOGGERS):
            yield str(entry["message"])


def ask(head: Machine) -> str:
    """Return what the model says about a red image."""
    image = {"type": "image_url", "image_url": {"url": image_url("red")}}
    content = [image, {"type": "text", "text": "What is this?"}]
    with head.client() as api:
        answer = api.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    return str(answer.json()["choices"][0]["message"]["content"])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Sends hostile requests to a worker, and judges its answers."""

import json
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import httpx

from tests.conftest import HttpWorker
from tests.support.hostile_bodies import Body
from tests.support.links import Server

SILENT_RESOLVER = """
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netdb.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
    if (name && strstr(name, ".silent.test")) {
        sleep(10);
        return EAI_AGAIN;
    }
    return ((__typeof__(&getaddrinfo))dlsym(RTLD_NEXT, "getaddrinfo"))(name, service, hints, result);
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
    struct sockaddr_in silent = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    if (address->sa_family == AF_INET && ((const struct sockaddr_in *)address)->sin_port == htons(53)) {
        int nobody = socket(AF_INET, SOCK_DGRAM, 0);
        size = sizeof silent;
        bind(nobody, (struct sockaddr *)&silent, size);
        getsockname(nobody, (struct sockaddr *)&silent, &size);
        address = (struct sockaddr *)&silent;
    }
    return ((__typeof__(&connect))dlsym(RTLD_NEXT, "connect"))(fd, address, size);
}
"""
"""A C library to preload: name servers never answer, neither those that the C library asks nor those of c-ares."""

SECONDS = 60.0
"""How long a hostile request may take until it is answered, unless its row says less."""


class Answer(NamedTuple):
    """Status 0: there was no answer, and the text is the reason."""

    status: int
    text: str
    seconds: float

    @property
    def error(self) -> dict[str, Any]:
        with suppress(ValueError, KeyError, TypeError):
            return dict(json.loads(self.text)["error"])
        return {}


def post(client: httpx.Client, body: Body) -> Answer:
    """Send a body and return the answer."""
    began = time.monotonic()
    try:
        answer = client.post(body.route, content=body.content, headers=dict(body.headers), timeout=SECONDS)
        return Answer(answer.status_code, answer.text, time.monotonic() - began)
    except httpx.TransportError as error:
        return Answer(0, repr(error), time.monotonic() - began)


def post_all(worker: HttpWorker, bodies: list[Body], at_once: int) -> list[Answer]:
    """Send bodies, some at once, and return their answers in order."""
    with worker.client() as client, ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda body: post(client, body), bodies))


def names_the_part(answer: Answer) -> bool:
    """Return whether an answer is an error about the first part of the first message."""
    part, message = "messages[0].content[0]", answer.error.get("message", "")
    return 400 <= answer.status < 500 and message.startswith(part) and message != part


def wrong_answers(bodies: list[Body], answers: list[Answer], is_right: Callable[[Answer], bool]) -> list[str]:
    """Return the bodies that were not refused as they should be. Print the slow ones."""
    wrong = []
    for body, answer in zip(bodies, answers, strict=True):
        line = f"{body.name}: {answer.status} after {answer.seconds:.1f} s: {answer.text[:200]}"
        if not (is_right(answer) or (body.may_pass and (answer.status == 200 or gives_a_reason(answer)))):
            wrong.append(line)
        elif answer.seconds > 1:
            print(line)
    return wrong


def gives_a_reason(answer: Answer) -> bool:
    """Return whether an answer is an error of the client with a message that is not too long."""
    return 400 <= answer.status < 500 and 10 < len(answer.error.get("message", "")) < 5000


def answer_on(connection: socket.socket, seconds: float = 5.0) -> str:
    """Return the first line of the answer, or "" if the other end closes the connection without one."""
    connection.settimeout(seconds)
    with suppress(ConnectionError), connection.makefile("rb") as lines:
        return lines.readline().decode("latin-1").strip()
    return ""


def is_closed(connection: socket.socket) -> bool:
    """Return whether the other end has closed a connection."""
    with suppress(ConnectionError):
        return bool(select.select([connection], [], [], 0)[0]) and not connection.recv(65536)
    return True


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once the condition is true. The test fails if it does not become true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


class CountingServer(Server):
    """Counts the connections that are open at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._open = 0
        self.most_open = 0

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open += 1
            self.most_open = max(self.most_open, self._open)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open -= 1

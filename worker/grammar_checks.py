"""A process that checks untrusted grammars: `python -m worker.grammar_checks SOCKET`, started by `engine/grammars.py`.

It is outside `engine/`, whose import takes seconds and a gigabyte.

It reads a JSON object from standard input, and then, for each check, one file descriptor from SOCKET: a connection
that carries `[KIND, SOURCE]` as JSON, and back `passed`, `unchecked`, or nothing if the grammar is too complex. Each
check runs in a forked process, which the kernel kills when its time or memory is used up.
"""

import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
import xgrammar

WALL_SECONDS = 90
"""How long a check may take if it waits for CPU time, or for itself."""
MEMORY_BYTES = 2 << 30
"""How much memory a check may use."""
WALK_STEPS = 128
"""After this number of tokens a grammar has passed."""
FIRST_SECONDS, TOKEN_SECONDS = 1.0, 0.05
"""The CPU time that tokens may take: at first, and more for each token. Meanwhile the engine generates nothing."""
THREADS = 8
"""As in vLLM's own compiler."""
NICE = 10
PR_SET_PDEATHSIG = 1


def main(control: socket.socket) -> None:
    """Fork a process for each check until the other end closes the socket."""
    arguments = json.load(sys.stdin.buffer)
    vocabulary = xgrammar.TokenizerInfo.deserialize_json(arguments["vocabulary"])
    lengths = torch.tensor([len(token) for token in vocabulary.decoded_vocab])
    quotes = torch.tensor([int(token.startswith(b'"')) for token in vocabulary.decoded_vocab])
    # A token that ends the text comes last.
    lengths[vocabulary.stop_token_ids] = quotes[vocabulary.stop_token_ids] = -1
    os.nice(NICE)
    # The kernel removes processes that have ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                try:
                    limit(arguments["cpu_seconds"])
                    control.close()
                    connection.sendall(check(connection, vocabulary, arguments["any_whitespace"], [lengths, quotes]))
                finally:
                    os._exit(0)


def limit(cpu_seconds: int) -> None:
    """Have the kernel kill this process after `cpu_seconds` of all threads, with its parent, or for too much memory."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    signal.alarm(WALL_SECONDS)
    memory = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check(
    connection: socket.socket, vocabulary: Any, any_whitespace: bool, preferences: Sequence[torch.Tensor]
) -> bytes:
    """Compile the grammar that the connection carries, and walk along it once for each preference."""
    kind, source = json.loads(b"".join(iter(lambda: connection.recv(1 << 16), b"")))
    threading.Thread(target=exit_with_caller, args=(connection,), daemon=True).start()
    compiler = xgrammar.GrammarCompiler(vocabulary, max_threads=THREADS, cache_enabled=False)
    try:
        grammar = compiled(compiler, kind, source, any_whitespace)
    except MemoryError:
        return b""
    except (RuntimeError, ValueError, KeyError, TypeError):
        return b"unchecked"
    return b"passed" if all(walk(grammar, preference) for preference in preferences) else b""


def exit_with_caller(connection: socket.socket) -> None:
    """End this process when nobody waits for its reply any more."""
    poll = select.poll()
    # Without events, this waits until both directions of the connection are closed.
    poll.register(connection, 0)
    poll.poll()
    os._exit(1)


def compiled(compiler: Any, kind: str, source: str, any_whitespace: bool) -> Any:
    """Compile a grammar as vLLM's `XgrammarBackend.compile_grammar` does."""
    if kind in ("json", "json_object"):
        separators = None if any_whitespace else (",", ":")
        schema = source if kind == "json" else '{"type": "object"}'
        return compiler.compile_json_schema(schema, any_whitespace=any_whitespace, separators=separators)
    if kind == "structural_tag" and "structures" in (tag := json.loads(source)):
        tags = [
            xgrammar.StructuralTagItem(begin=each["begin"], schema=json.dumps(each["schema"]), end=each["end"])
            for each in tag["structures"]
        ]
        return compiler.compile_structural_tag(tags, tag["triggers"])
    methods = {
        "regex": compiler.compile_regex,
        "choice": compiler.compile_grammar,
        "ebnf": compiler.compile_grammar,
        "lark": compiler.compile_lark,
        "structural_tag": compiler.compile_structural_tag,
    }
    return methods[kind](source)


def walk(grammar: Any, preference: torch.Tensor) -> bool:
    """Generate the allowed token with the highest preference, again and again; return whether that was fast.

    The longest tokens reach the costly states of a repetition soonest. A quotation mark ends a free string of JSON.
    """
    matcher = xgrammar.GrammarMatcher(grammar)
    mask = xgrammar.allocate_token_bitmask(1, grammar.tokenizer_info.vocab_size)
    bits = torch.arange(32)
    start = time.thread_time()
    for step in range(WALK_STEPS):
        matcher.fill_next_token_bitmask(mask)
        allowed = (mask.view(-1, 1) >> bits & 1).view(-1)[: preference.numel()]
        accepted = matcher.accept_token(int((allowed * (preference + 2)).argmax()))
        if time.thread_time() - start > FIRST_SECONDS + TOKEN_SECONDS * step:
            return False
        if not accepted or matcher.is_terminated():
            break
    return True


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))

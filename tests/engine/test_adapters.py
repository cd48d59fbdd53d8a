"""Loading and unloading of LoRA adapters, with a scripted engine in place of vLLM's."""

import asyncio
import json
import random
import socket
from argparse import Namespace
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from starlette.formparsers import MultiPartException
from starlette.requests import Request as StarletteRequest
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.lora.ops.torch_ops import bgmv_shrink
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from tests.model.hub import hub_environment
from tests.support.adapters import WEIGHTS, files_of, write
from tests.support.tiny import MODEL
from worker.engine import parse_arguments
from worker.engine.adapters import Adapters
from worker.errors import JobError
from worker.model.adapter_checks import (
    AdapterError,
    AdapterNotAllowedError,
    AdapterNotFoundError,
    AdapterUnavailableError,
)
from worker.request.asgi import IncompleteResponseError, Message, Receive, Request, Send, exchange
from worker.request.rewrite import then
from worker.settings import read

NAMES = ("a", "b", "c", "d")


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test."""

    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


class Engine:
    """Takes the place of vLLM's client and of its list of models. Fails if it would load an adapter by itself."""

    def __init__(self, capacity: int) -> None:
        # One more than is used on CPUs.
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_cpu_loras=capacity + 1, max_lora_rank=8))
        self.capacity = capacity
        self.output_processor = SimpleNamespace(request_states={})
        self.errored = False
        self.loaded: dict[int, LoRARequest] = {}
        self.loads: list[str] = []
        self.asked: list[str] = []
        """Names of the adapters whose load has begun."""
        self.damaged: set[str] = set()
        """Names of the adapters that cannot be loaded."""
        self.hold = asyncio.Event()
        """Loads wait for it."""
        self.hold.set()
        self.lora_requests: dict[str, LoRARequest] = {}
        self.lora_resolvers: list[Any] = [None]
        self.lora_id_counter = AtomicCounter(0)
        self.base_model_paths = [SimpleNamespace(name="tiny", model_path="/m")]
        self.app = SimpleNamespace(state=SimpleNamespace(openai_serving_models=self))

    def is_base_model(self, name: str) -> bool:
        return name == "tiny"

    async def show_available_models(self) -> ModelList:
        adapters = [ModelCard(id=name, root=each.lora_path) for name, each in self.lora_requests.items()]
        return ModelList(data=[ModelCard(id="tiny"), *adapters])

    async def add_lora(self, request: LoRARequest) -> bool:
        self.asked.append(request.lora_name)
        await asyncio.sleep(0)
        await self.hold.wait()
        assert await asyncio.to_thread(Path(request.lora_path, WEIGHTS).is_file) or request.lora_path == "/static"
        self.loads.append(request.lora_name)
        if request.lora_name in self.damaged:
            raise Exception(f"Call to add_lora method failed: {request.lora_path} is damaged")
        self.loaded[request.lora_int_id] = request
        assert len(self.loaded) <= self.capacity
        return True

    async def remove_lora(self, number: int) -> bool:
        await asyncio.sleep(0)
        return self.loaded.pop(number, None) is not None


class Setup:
    """An engine, its adapters, and an app that holds each request until `release` is set."""

    def __init__(
        self,
        folder: Path,
        capacity: int = 1,
        allow: str = "*",
        names: Sequence[str] = NAMES,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        for name in names:
            write(folder / name, files_of("french"))
        self.engine = Engine(capacity)
        variables = {
            "MODEL_NAME": str(MODEL),
            "LORA_ALLOW": allow,
            "ADAPTER_FOLDER": str(folder),
            "HF_HUB_OFFLINE": "1",
            **environ,
        }
        client: Any = self.engine
        app: Any = self.engine.app
        self.adapters = Adapters(client, app, MODEL, read(variables))
        self.adapters._copies.rmdir()
        # Pytest removes this folder.
        self.adapters._copies = folder.with_name(f"{folder.name}-copies")
        self.adapters._copies.mkdir()
        self.running: list[str] = []
        self.release: dict[str, asyncio.Event] = {name: asyncio.Event() for name in names}
        self.layer = self.adapters.over(self._app)

    async def _app(self, _scope: Message, receive: Receive, send: Send) -> None:
        """Look the adapter up as vLLM does, and use it for a while."""
        name = json.loads((await receive())["body"])["model"]
        request = self.engine.lora_requests.get(name)
        self.running.append(name)
        try:
            await self.release.get(name, self.engine.hold).wait()
        finally:
            self.running.remove(name)
        is_loaded = request is not None and self.engine.loaded.get(request.lora_int_id) is request
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(is_loaded).encode()})

    async def ask(self, name: Any, body: bytes = b"") -> Any:
        """Return whether the adapter was loaded while a request for it ran. `body` takes the place of a simple one."""
        body = body or json.dumps({"model": name}).encode()
        headers = {"content-type": "application/json"}
        try:
            async with exchange(self.layer, Request("POST", "/v1/x", headers=headers, body=body)) as response:
                return json.loads(await response.read_all())
        except IncompleteResponseError as error:
            raise error.__cause__ or error from None

    def start(self, name: str) -> "asyncio.Task[Any]":
        return asyncio.create_task(self.ask(name))

    def is_leaving(self, name: str) -> bool:
        """Return whether another adapter waits for the place of this one."""
        adapter = self.adapters._adapters.get(name)
        return adapter is not None and adapter.is_leaving

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - it may be any condition
                await asyncio.sleep(0.01)


async def turns() -> None:
    """Let everything go on that waits for the loop alone."""
    for _ in range(100):
        await asyncio.sleep(0)


@in_a_loop
async def test_the_least_recently_used_one_goes(tmp_path: Path) -> None:
    setup = Setup(tmp_path, capacity=2)
    for event in setup.release.values():
        event.set()
    for name in ("a", "b", "a", "c", "a", "b"):
        assert await setup.ask(name)
    assert setup.engine.loads == ["a", "b", "c", "b"]
    assert [request.lora_name for request in setup.engine.loaded.values()] == ["a", "b"]
    assert setup.engine.lora_requests.keys() == {"a", "b"}


@in_a_loop
async def test_concurrent_requests_share_one_load(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.release["a"].set()
    assert await asyncio.gather(*(setup.ask("a") for _ in range(20))) == [True] * 20
    assert setup.engine.loads == ["a"]


@in_a_loop
async def test_one_in_use_stays_and_new_requests_take_turns(tmp_path: Path) -> None:
    """A request for another adapter waits for those that run, but not for those that come later."""
    setup = Setup(tmp_path)
    first = setup.start("a")
    await setup.until(lambda: setup.running == ["a"])
    other = setup.start("b")
    await setup.until(lambda: setup.is_leaving("a"))
    later = [setup.start("a") for _ in range(3)]
    await turns()
    assert (setup.running, setup.engine.loads) == (["a"], ["a"])
    setup.release["a"].set()
    assert await first
    await setup.until(lambda: setup.running == ["b"])
    setup.release["b"].set()
    assert await asyncio.gather(other, *later) == [True] * 4
    assert setup.engine.loads == ["a", "b", "a"]


@in_a_loop
async def test_whichever_is_free_first_makes_room(tmp_path: Path) -> None:
    """The least recently used one stays if another one is free earlier, and goes on taking requests."""
    setup = Setup(tmp_path, capacity=2)
    tasks = [setup.start("a")]
    await setup.until(lambda: setup.running == ["a"])
    tasks.append(setup.start("b"))
    await setup.until(lambda: setup.running == ["a", "b"])
    tasks.append(setup.start("c"))
    await setup.until(lambda: setup.is_leaving("a"))
    setup.release["b"].set()
    await setup.until(lambda: setup.running == ["a", "c"])
    tasks.append(setup.start("a"))
    await setup.until(lambda: setup.running == ["a", "c", "a"])
    for event in setup.release.values():
        event.set()
    assert await asyncio.gather(*tasks) == [True] * 4
    assert setup.engine.loads == ["a", "b", "c"]


@in_a_loop
async def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    """While two adapters are always in use, the third gets the place of the one that was used least recently."""
    setup = Setup(tmp_path, capacity=2)
    tasks = [setup.start("a")]
    await setup.until(lambda: setup.running == ["a"])
    tasks.append(setup.start("b"))
    await setup.until(lambda: setup.running == ["a", "b"])
    tasks.append(setup.start("c"))
    await setup.until(lambda: setup.is_leaving("a"))
    for name in ("a", "b", "a", "b"):
        tasks.append(setup.start(name))
        await turns()
    assert setup.running == ["a", "b", "b", "b"]
    setup.release["a"].set()
    await setup.until(lambda: setup.running == ["b", "b", "b", "c"])
    for event in setup.release.values():
        event.set()
    assert await asyncio.gather(*tasks) == [True] * 7
    assert setup.engine.loads == ["a", "b", "c", "a"]


@in_a_loop
async def test_a_request_in_the_background_keeps_its_adapter(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.release["a"].set()
    setup.release["b"].set()
    await setup.ask("a")
    setup.engine.output_processor.request_states["1"] = SimpleNamespace(lora_name="a")
    other = setup.start("b")
    await setup.until(lambda: setup.is_leaving("a"))
    assert setup.engine.loads == ["a"]
    setup.engine.output_processor.request_states.clear()
    assert await other


@pytest.mark.parametrize("capacity", [1, 2, 3])
@in_a_loop
async def test_random_requests(tmp_path: Path, capacity: int) -> None:
    """Whatever comes in whatever order, each request has its adapter for as long as it runs."""
    setup, rng = Setup(tmp_path, capacity), random.Random(capacity)

    async def one() -> bool:
        await asyncio.sleep(rng.random())
        task = setup.start(rng.choice(NAMES))
        if rng.random() < 0.2:
            await asyncio.sleep(rng.random() / 10)
            task.cancel()
        await asyncio.wait([task])
        return task.cancelled() or task.result() is True

    async def flicker() -> None:
        while True:
            await asyncio.sleep(rng.random() / 50)
            event = setup.release[rng.choice(NAMES)]
            (event.clear if event.is_set() else event.set)()

    flickering = asyncio.create_task(flicker())
    async with asyncio.timeout(60):
        assert all(await asyncio.gather(*(one() for _ in range(300))))
    flickering.cancel()
    assert set(setup.engine.loads) == set(NAMES)
    await setup.until(lambda: not setup.running)
    assert not any(adapter.users for adapter in setup.adapters._adapters.values())


@in_a_loop
async def test_many_adapters_wait_for_one_place(tmp_path: Path) -> None:
    """Each has its copy until it is loaded, and no copy stays."""
    names = [f"a{number}" for number in range(24)]
    setup = Setup(tmp_path / "adapters", names=names)
    tasks = [setup.start(name) for name in names]
    await setup.until(lambda: bool(setup.running))
    await setup.until(lambda: len(list(setup.adapters._copies.iterdir())) == len(names) - 1)
    for event in setup.release.values():
        event.set()
    assert await asyncio.gather(*tasks) == [True] * len(names)
    assert sorted(setup.engine.loads) == sorted(names)
    assert not list(setup.adapters._copies.iterdir())


@in_a_loop
async def test_a_damaged_one_is_an_error_for_all_who_wait(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.release["b"].set()
    setup.engine.damaged = {"b"}
    errors = await asyncio.gather(*(setup.ask("b") for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in errors] == [AdapterError] * 3
    assert "vLLM cannot load the LoRA adapter 'b': its folder is damaged" in str(errors[0])
    assert not setup.engine.loaded
    assert not setup.engine.lora_requests
    assert not list(setup.adapters._copies.iterdir())
    setup.engine.damaged = set()
    assert await setup.ask("b")


@in_a_loop
async def test_a_dead_engine_is_no_fault_of_the_adapter(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.engine.damaged, setup.engine.errored = {"b"}, True
    with pytest.raises(Exception, match="Call to add_lora method failed") as caught:
        await setup.ask("b")
    assert not isinstance(caught.value, JobError)


@in_a_loop
async def test_a_load_goes_on_without_its_callers(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.engine.hold.clear()
    task = setup.start("a")
    await setup.until(lambda: setup.engine.asked == ["a"])
    task.cancel()
    await asyncio.wait([task])
    setup.engine.hold.set()
    setup.release["a"].set()
    await setup.until(lambda: "a" in setup.engine.lora_requests)
    assert await setup.ask("a")
    assert setup.engine.loads == ["a"]


@in_a_loop
async def test_a_client_that_disconnects_while_it_waits(tmp_path: Path) -> None:
    """Its request ends at once, but the load goes on."""
    setup = Setup(tmp_path)
    setup.engine.hold.clear()
    body, has_left = json.dumps({"model": "a"}).encode(), asyncio.Event()
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await has_left.wait()
        return {"type": "http.disconnect"}

    async def send(_message: Message) -> None:
        raise AssertionError("nobody is there")

    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": []}
    task = asyncio.ensure_future(setup.layer(scope, receive, send))
    await setup.until(lambda: setup.engine.asked == ["a"])
    assert not task.done()
    has_left.set()
    await task
    assert not setup.adapters._adapters["a"].users
    setup.engine.hold.set()
    setup.release["a"].set()
    assert await setup.ask("a")
    assert setup.engine.loads == ["a"]


@in_a_loop
async def test_a_full_disk(tmp_path: Path) -> None:
    """Nothing can be copied."""
    setup = Setup(tmp_path)
    setup.adapters._copies.rmdir()
    with pytest.raises(AdapterUnavailableError, match="cannot copy the files of the LoRA adapter 'a': No such file"):
        await setup.ask("a")


@in_a_loop
async def test_only_requests_load_and_unload_adapters(tmp_path: Path) -> None:
    """vLLM's own routes and resolvers would change what is loaded."""
    models = Setup(tmp_path).adapters._models
    for change in (models.load_lora_adapter, models.unload_lora_adapter):
        answer = await change(None)
        assert (answer.error.code, answer.error.type) == (403, "PermissionDeniedError")
        assert "LORA_ALLOW is set" in answer.error.message
    assert not models.lora_resolvers


@in_a_loop
async def test_the_end_does_not_wait_for_downloads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = {**hub_environment(silent.getsockname()[1], tmp_path), "HF_HUB_OFFLINE": ""}
        setup = Setup(tmp_path, environ=hub)
        task = setup.start("org/none")
        await setup.until(lambda: bool(setup.adapters._downloads._processes))
        setup.adapters.close()
        with pytest.raises(AdapterUnavailableError, match="ended early"):
            async with asyncio.timeout(10):
                await task
    assert not setup.adapters._copies.exists()


@in_a_loop
async def test_static_adapters_are_unloaded_too_and_stay_known(tmp_path: Path) -> None:
    setup = Setup(tmp_path, allow="a")
    static = LoRARequest("static", setup.engine.lora_id_counter.inc(1), "/static")
    setup.engine.lora_requests["static"] = static
    setup.release["a"].set()
    for name in ("static", "a", "static"):
        assert await setup.ask(name)
    assert setup.engine.loads == ["static", "a", "static"]
    assert [each.lora_path for each in setup.engine.loaded.values()] == ["/static"]
    assert setup.engine.lora_requests == {"static": static}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("org/a", AdapterNotAllowedError, id="not allowed"),
        pytest.param("a/../b", AdapterNotAllowedError, id="a path"),
        pytest.param("mine", AdapterNotFoundError, id="unknown"),
        pytest.param("my-org/a", AdapterNotFoundError, id="not on disk, and offline"),
    ],
)
@in_a_loop
async def test_refused_names(tmp_path: Path, name: str, expected: type[JobError]) -> None:
    setup = Setup(tmp_path, allow="mine,my-org/*")
    with pytest.raises(expected):
        await setup.ask(name)


@pytest.mark.parametrize("name", ["tiny", "gpt-9", "", None, 5, ["a"]])
@in_a_loop
async def test_other_names_are_left_to_vllm(tmp_path: Path, name: Any) -> None:
    setup = Setup(tmp_path, allow="mine,my-org/*")
    setup.engine.hold.set()
    body = json.dumps({"model": name, "x": [{"model": "mine"}]}).encode()
    received = []

    async def app(_scope: Message, receive: Receive, send: Send) -> None:
        received.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with exchange(setup.adapters.over(app), Request("POST", "/v1/x", body=body)) as response:
        assert response.status == 200
    assert received[0]["body"] == body


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"model": "a", "x": NaN}', id="NaN"),
        pytest.param(b'\xef\xbb\xbf{"model": "a"}', id="a byte order mark"),
        pytest.param(b'{"model": "a", "x": "\\ud83d cut"}', id="half of a surrogate pair"),
        pytest.param(b'{"mod\\u0065l": "\\u0061"}', id="escapes"),
        pytest.param(b'{"model": "b", "model": "a"}', id="twice"),
    ],
)
@in_a_loop
async def test_bodies_that_only_some_parsers_accept(tmp_path: Path, body: bytes) -> None:
    """The layer must find the same model as vLLM, which reads JSON with Python's parser."""
    setup = Setup(tmp_path)
    setup.release["a"].set()
    assert await setup.ask("a", body)
    assert setup.engine.loads == ["a"]


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{", b"\xff", b'{"model": NaN}', b"[" * 10_000, b'{"x":' + b"[" * 100_000]
)
@in_a_loop
async def test_bodies_that_name_no_model(tmp_path: Path, body: bytes) -> None:
    setup = Setup(tmp_path)

    async def app(_scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with exchange(setup.adapters.over(app), Request("POST", "/v1/x", body=body)) as response:
        assert response.status == 400
    assert not setup.engine.loads


def part(disposition: str, value: bytes = b"a") -> bytes:
    return f"--x\r\ncontent-disposition: form-data; {disposition}\r\n\r\n".encode() + value + b"\r\n"


@pytest.mark.parametrize(
    ("form", "loads"),
    [
        pytest.param(part('name="model"') + b"--x--\r\n", ["a"], id="a field"),
        pytest.param(
            part('name="f"; filename="f"', bytes(10**6)) + part('name="model"') + b"--x--\r\n", ["a"], id="last"
        ),
        pytest.param(part('name="model"', b"b") + part('name="model"') + b"--x--\r\n", ["a"], id="twice"),
        pytest.param(part('name="model"; filename="a"') + b"--x--\r\n", [], id="a file"),
        pytest.param(part('name="other"') + b"--x--\r\n", [], id="another field"),
        pytest.param(b"no form", [], id="no form"),
    ],
)
@in_a_loop
async def test_the_model_in_a_form(tmp_path: Path, form: bytes, loads: list[str]) -> None:
    """Requests for transcriptions are forms. The app gets the form unchanged, and reads the same model."""
    setup = Setup(tmp_path)
    received = []

    async def app(scope: Message, receive: Receive, send: Send) -> None:
        received.append(message := await receive())
        with suppress(MultiPartException):
            async with StarletteRequest(scope, then(message, receive)).form() as fields:
                assert [name for name in [fields.get("model")] if isinstance(name, str)] == loads
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    request = Request("POST", "/v1/x", headers={"content-type": "multipart/form-data; boundary=x"}, body=form)
    async with exchange(setup.adapters.over(app), request) as response:
        assert response.status == 200
    assert (setup.engine.loads, received[0]["body"]) == (loads, form)


def test_vllm_still_uses_the_last_place_for_requests_without_an_adapter() -> None:
    """If this fails, vLLM has been corrected, and `keep_slot_free` is not needed any more."""
    output = torch.zeros(1, 1)
    bgmv_shrink(torch.ones(1, 4), torch.ones(2, 1, 1, 4), output, torch.tensor([-1]))
    assert output.any()


def test_lora_is_turned_on_and_one_place_stays_free() -> None:
    def parsed(**variables: str) -> Namespace:
        return parse_arguments(read({"MODEL_NAME": str(MODEL), "LORA_ALLOW": "org/*", **variables}))

    args = parsed(MAX_LORAS="2", MAX_CPU_LORAS="4")
    assert (args.enable_lora, args.max_loras, args.max_cpu_loras) == (True, 5, 5)
    args = parsed(LORA_MODULES="a=/a,b=/b,c=/c")
    assert (args.enable_lora, args.max_loras, args.max_cpu_loras) == (True, 4, 4)
    args = parsed(ENABLE_LORA="false")
    assert (args.enable_lora, args.max_loras) == (False, 1)


@in_a_loop
async def test_the_list_of_models(tmp_path: Path) -> None:
    """It has what is loaded, and what is known to be loadable. It does not show folders."""
    setup = Setup(tmp_path, allow="a,b,org/one,other/*")
    setup.release["a"].set()
    await setup.ask("a")
    models = await setup.engine.show_available_models()
    assert [(card.id, card.root, card.parent) for card in models.data[1:]] == [
        ("a", "a", "tiny"),
        ("b", "b", "tiny"),
        ("org/one", "org/one", "tiny"),
    ]
    assert models.data[0].id == "tiny"

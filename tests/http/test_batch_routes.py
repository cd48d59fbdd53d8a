"""OpenAI's routes for files and batches, with its client and a scripted engine."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.http.serving import error_of, serving, wait_until
from tests.support.batches import jsonl
from tests.support.http_batches import Chats, client, create, ended, names_in, serving_batches, upload
from worker.batch.objects import DAY
from worker.batch.store import owner_of

KEYS = {"worker_api_key": ("first:key-one", "key-two")}
FORM = b"--x\r\nContent-Disposition: form-data; name="
FORM_TYPE = {"content-type": "multipart/form-data; boundary=x"}


def results(api: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """Return the results in an output file by their custom_id."""
    assert file_id is not None
    items = map(json.loads, api.files.content(file_id).text.splitlines())
    return {result["custom_id"]: result for result in items}


def test_a_batch_from_its_upload_to_its_results(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        api = client(worker)
        file = api.files.retrieve(upload(api, "a", "wrong", "b"))
        assert (file.filename, file.purpose, file.status) == ("requests.jsonl", "batch", "processed")
        assert file.bytes == len(api.files.content(file.id).content)
        assert file.expires_at == file.created_at + 30 * DAY
        created = api.batches.retrieve(create(api, file.id, metadata={"for": "tests"}))
        assert (created.metadata, created.completion_window) == ({"for": "tests"}, "24h")
        batch = ended(api, created.id)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
        assert batch.usage is not None
        assert batch.usage.total_tokens == 24
        times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert list(times) == sorted(time for time in times if time)
        assert (batch.errors, batch.failed_at, batch.cancelled_at) == (None, None, None)
        good, bad = results(api, batch.output_file_id), results(api, batch.error_file_id)
        assert (sorted(good), sorted(bad)) == (["id-0", "id-2"], ["id-1"])
        assert good["id-0"]["id"].startswith("batch_req_")
        assert bad["id-1"]["response"]["status_code"] == 400
        assert api.files.retrieve(batch.output_file_id or "").purpose == "batch_output"
        assert [each.id for each in api.batches.list()] == [batch.id]
        assert {each.id for each in api.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
        assert [each.id for each in api.files.list(purpose="batch")] == [file.id]
        for each in api.files.list():
            assert api.files.delete(each.id).deleted
        assert list(api.files.list()) == []
        assert names_in(tmp_path) == {f"{batch.id}.json"}


def test_without_a_folder_the_routes_say_which_setting_is_missing() -> None:
    with serving() as worker:
        for path in (
            "/v1/files",
            "/v1/files/file-1",
            "/v1/files/file-1/content",
            "/v1/batches",
            "/v1/batches/b/cancel",
        ):
            response = worker.get(path)
            assert (response.status_code, "BATCH_FOLDER" in error_of(response)["message"]) == (404, True)
    with serving(worker_api_key=("key-one",)) as worker:
        assert worker.get("/v1/files").status_code == 401


def test_keys_do_not_see_each_others_files_and_batches(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats(), **KEYS) as worker:
        first, second = client(worker, "key-one"), client(worker, "key-two")
        file_id = upload(first, "a")
        batch = ended(first, create(first, file_id))
        for attempt in (
            lambda: second.files.retrieve(file_id),
            lambda: second.files.content(file_id),
            lambda: second.files.delete(file_id),
            lambda: second.files.content(batch.output_file_id or ""),
            lambda: second.batches.retrieve(batch.id),
            lambda: second.batches.cancel(batch.id),
            lambda: create(second, file_id),
        ):
            with pytest.raises(openai.NotFoundError, match="of this API key"):
                attempt()
        assert (list(second.files.list()), list(second.batches.list())) == ([], [])
        with pytest.raises(openai.AuthenticationError):
            client(worker, "another key").files.list()
        assert first.files.content(file_id).content
        assert worker.get("/v1/files").status_code == 401
    # Neither key is on the disk.
    assert {path.name for path in tmp_path.iterdir()} == {owner_of("key-one")}
    assert not any(b"key-one" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../../secret", id="a path"),
        pytest.param("..%2f..%2fsecret", id="an encoded path"),
        pytest.param("file-0123456789abcdef0123456789abcdef%2f..%2fx", id="a path behind an id"),
        pytest.param("file-0123456789abcdef0123456789abcdef%00", id="a null character"),
        pytest.param("file-0123456789ABCDEF0123456789ABCDEF", id="capitals"),
        pytest.param("*", id="a pattern"),
        pytest.param("", id="nothing"),
    ],
)
def test_ids_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "secret.data").write_text("secret")
    with serving_batches(tmp_path / "batches", Chats()) as worker:
        for method, path in (
            ("GET", f"/v1/files/{name}"),
            ("GET", f"/v1/files/{name}/content"),
            ("DELETE", f"/v1/files/{name}"),
            ("GET", f"/v1/batches/{name}"),
            ("POST", f"/v1/batches/{name}/cancel"),
        ):
            # Not through a library, which would shorten the path.
            with socket.create_connection(("127.0.0.1", worker.port)) as connection:
                connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                answer = b"".join(iter(lambda: connection.recv(65_536), b""))
            assert answer.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 405 ")), (method, path, answer)
        body = {"input_file_id": name, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        assert worker.post("/v1/batches", json=body).status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("../../../outside.jsonl", id="a path"),
        pytest.param("/tmp/outside.jsonl", id="an absolute path"),
        pytest.param('a"b\r\nX-Header: c.jsonl', id="a header"),
        pytest.param("データ.jsonl", id="Japanese"),
        pytest.param("a" * 2000, id="a long name"),
    ],
)
def test_the_name_of_an_upload_is_only_data(tmp_path: Path, name: str) -> None:
    with serving_batches(tmp_path / "batches", Chats()) as worker:
        file = client(worker).files.create(file=(name, b"{}"), purpose="batch")
        assert len(file.filename) <= 255
        content = worker.get(f"/v1/files/{file.id}/content")
        assert (content.content, "x-header" in content.headers) == (b"{}", False)
        assert content.headers["x-content-type-options"] == "nosniff"
        if name.startswith("デ"):
            assert file.filename == name
    assert names_in(tmp_path) == {f"{file.id}.json", f"{file.id}.data"}


def test_pages_are_in_the_order_of_creation(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        api = client(worker)
        files = []
        for number in range(5):
            files.append(upload(api, str(number)))
            time.sleep(0.002)
        page = api.files.list(limit=2)
        assert ([each.id for each in page.data], page.has_more) == ([files[4], files[3]], True)
        assert [each.id for each in page] == files[::-1]
        assert [each.id for each in api.files.list(order="asc", limit=2)] == files
        assert [each.id for each in api.files.list(after=files[1])] == [files[0]]
        batches = [ended(api, create(api, file_id)).id for file_id in files[:3]]
        assert [each.id for each in api.batches.list(limit=1)] == batches[::-1]
        for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("limit=101", "limit"), ("order=x", "order")):
            response = worker.get(f"/v1/batches?{query}")
            assert (response.status_code, error_of(response)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        pytest.param({"endpoint": "/v1/models"}, 400, "'endpoint' must be one of", id="a route without a body"),
        pytest.param({"endpoint": "/metrics"}, 400, "'endpoint' must be one of", id="no route"),
        pytest.param({"completion_window": "7d"}, 400, "'completion_window' is wrong", id="another window"),
        pytest.param({"input_file_id": "file-1"}, 404, "No file 'file-1'", id="no such file"),
        pytest.param({"input_file_id": None}, 400, "'input_file_id' is wrong", id="no file"),
        pytest.param({"metadata": {"a": 1}}, 400, "'metadata.a' is wrong", id="a number in the metadata"),
        pytest.param({"metadata": {str(n): "" for n in range(17)}}, 400, "'metadata' is wrong", id="much metadata"),
        pytest.param({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "seconds", id="a second"),
    ],
)
def test_a_wrong_batch_is_refused(tmp_path: Path, change: dict[str, Any], status: int, text: str) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        body = {"input_file_id": upload(client(worker), "a"), "endpoint": "/v1/embeddings", "completion_window": "24h"}
        response = worker.post("/v1/batches", json=body | change)
        assert (response.status_code, text in error_of(response)["message"]) == (status, True), response.text


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b"", 400, id="empty"),
        pytest.param(b"[" * 60_000, 400, id="deep"),
        pytest.param(b"\xff", 400, id="no text"),
    ],
)
def test_a_wrong_body_is_refused(tmp_path: Path, body: bytes, status: int) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        response = worker.post("/v1/batches", content=body, json=None)
        assert (response.status_code, bool(error_of(response))) == (status, True)


def test_requests_in_the_body_of_a_batch_are_refused_with_advice(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        response = worker.post("/v1/batches", content=b" " * 70_000, json=None)
        message = error_of(response)["message"]
        assert (response.status_code, "Upload the requests as a file" in message) == (413, True)
        assert "smaller" not in message


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(b"", "damaged or incomplete", id="empty"),
        pytest.param(b"no form", "damaged or incomplete", id="no form"),
        pytest.param(FORM + b'"file"\r\n\r\n{}\r\n', "damaged or incomplete", id="no end"),
        pytest.param(FORM + b'"purpose"\r\n\r\nbatch\r\n--x--', "no field 'file'", id="no file"),
        pytest.param(FORM + b'"file"\r\n\r\n{}\r\n--x--', "'purpose' must be 'batch'", id="no purpose"),
        pytest.param(FORM + b'"file"\r\n\r\n\r\n' + FORM + b'"file"\r\n\r\n\r\n--x--', "several files", id="two files"),
        pytest.param(FORM + b'"x"\r\n\r\n' + b"x" * 70_000 + b"\r\n--x--", "besides the file", id="a large field"),
    ],
)
def test_a_wrong_upload_is_refused_and_leaves_nothing(tmp_path: Path, body: bytes, text: str) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        response = worker.post("/v1/files", content=body, headers=FORM_TYPE, json=None)
        assert (response.status_code, text in error_of(response)["message"]) == (400, True), response.text
        assert worker.post("/v1/files", json={}).status_code == 400
        with pytest.raises(openai.BadRequestError, match="'purpose' must be 'batch'"):
            client(worker).files.create(file=b"{}", purpose="vision")
        assert names_in(tmp_path) == set()


def test_an_upload_may_be_larger_than_a_request_but_not_than_its_limit(tmp_path: Path) -> None:
    limits = {"max_request_bytes": 1000, "max_total_request_bytes": 10_000, "max_batch_file_bytes": 3_000_000}
    with serving_batches(tmp_path, Chats(), **limits) as worker:
        api = client(worker)
        content = os.urandom(3_000_000)
        file = api.files.create(file=content, purpose="batch")
        assert api.files.content(file.id).content == content
        assert (
            api.files.with_raw_response.content(file.id, extra_headers={"range": "bytes=10-19"}).content
            == content[10:20]
        )
        with pytest.raises(openai.APIStatusError, match="MAX_BATCH_FILE_BYTES=3000000"):
            api.files.create(file=content + b"x", purpose="batch")
        with pytest.raises(openai.APIStatusError, match="MAX_BATCH_FILE_BYTES=3000000") as caught:
            api.files.create(file=content + content, purpose="batch")
        assert caught.value.status_code == 413
        assert names_in(tmp_path) == {f"{file.id}.json", f"{file.id}.data"}
        assert worker.memory.held == 0


def test_a_folder_that_is_full_is_told_in_words(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats(), max_batch_folder_bytes=1_000_000) as worker:
        api = client(worker)
        first = api.files.create(file=bytes(900_000), purpose="batch")
        with pytest.raises(openai.InternalServerError, match="MAX_BATCH_FOLDER_BYTES=1000000") as caught:
            api.files.create(file=bytes(200_000), purpose="batch")
        assert caught.value.status_code == 507
        api.files.delete(first.id)
        api.files.create(file=bytes(200_000), purpose="batch")


def test_an_upload_whose_size_is_not_known_before_does_not_exceed_the_limit(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats(), max_batch_folder_bytes=1_000_000) as worker:
        start = FORM + b'"purpose"\r\n\r\nbatch\r\n' + FORM + b'"file"; filename="a"\r\n\r\n'
        for size, status in ((1_100_000, 507), (900_000, 200), (900_000, 507)):
            chunks = iter([start, bytes(size), b"\r\n--x--\r\n"])
            response = worker.post("/v1/files", content=chunks, headers=FORM_TYPE, json=None)
            assert response.status_code == status, response.text
        (file,) = client(worker).files.list()
        assert names_in(tmp_path) == {f"{file.id}.json", f"{file.id}.data"}


def test_a_request_that_fails_in_any_case_is_not_sent_again_by_the_client(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats(), max_batch_folder_bytes=10_000) as worker:
        api = client(worker).with_options(max_retries=2)
        batch_id = ended(api, create(api, upload(api, "a"))).id
        with pytest.raises(openai.ConflictError) as cancelled:
            api.batches.cancel(batch_id)
        with pytest.raises(openai.InternalServerError, match="MAX_BATCH_FOLDER_BYTES") as full:
            api.files.create(file=bytes(20_000), purpose="batch")
        for caught in (cancelled, full):
            assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_client_that_leaves_during_its_upload_leaves_nothing(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        with socket.create_connection(("127.0.0.1", worker.port)) as connection:
            head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n"
            kind = f"Content-Type: {FORM_TYPE['content-type']}\r\n\r\n"
            connection.sendall((head + kind).encode() + FORM + b'"file"\r\n\r\n' + bytes(2_000_000))
            wait_until("the upload is on the disk", lambda: bool(names_in(tmp_path)))
            (name,) = names_in(tmp_path)
            assert name.endswith(".data.tmp")
            assert list(client(worker).files.list()) == []
        wait_until("the upload is removed", lambda: not names_in(tmp_path))


def test_a_wrong_method_or_route_is_refused(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        response = httpx.put(f"{worker.url}/v1/files")
        assert (response.status_code, response.headers["allow"]) == (405, "GET, POST")
        assert httpx.delete(f"{worker.url}/v1/batches/batch_1").status_code == 405
        assert worker.post("/v1/files/x/cancel").status_code == 404
        assert worker.get("/v1/files/x/y/z").status_code == 404


def test_the_files_of_a_worker_that_loads_its_model_can_be_read(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        file_id = upload(client(worker), "a")
    with serving(batch_folder=str(tmp_path), ready=False) as worker:
        assert client(worker).files.retrieve(file_id).id == file_id
        batch_id = create(client(worker), file_id)
        assert client(worker).batches.retrieve(batch_id).status == "validating"
    with serving_batches(tmp_path, Chats()) as worker:
        assert ended(client(worker), batch_id).status == "completed"


def test_a_file_that_is_no_batch_fails_with_its_first_mistakes(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        api = client(worker)
        file = api.files.create(file=b"<html>\n[1]\n", purpose="batch")
        batch = ended(api, create(api, file.id))
        assert (batch.status, batch.output_file_id, batch.in_progress_at) == ("failed", None, None)
        assert batch.failed_at
        assert batch.errors is not None
        assert [(error.line, error.code) for error in batch.errors.data or []] == [
            (1, "invalid_json_line"),
            (2, "invalid_json_line"),
        ]
        empty = ended(api, create(api, api.files.create(file=b"\n", purpose="batch").id))
        assert empty.errors is not None
        (mistake,) = empty.errors.data or []
        assert (mistake.line, "It is empty." in (mistake.message or "")) == (None, True)
        with pytest.raises(openai.ConflictError, match="is failed already"):
            api.batches.cancel(batch.id)


def test_files_of_the_caller_may_expire_early(tmp_path: Path) -> None:
    with serving_batches(tmp_path, Chats()) as worker:
        api = client(worker)
        expiry: Any = {"anchor": "created_at", "seconds": 3600}
        content = jsonl([])
        file = api.files.create(file=content, purpose="batch", expires_after=expiry)
        assert file.expires_at == file.created_at + 3600
        with pytest.raises(openai.BadRequestError, match="'expires_after' must have"):
            api.files.create(file=content, purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})
        batch = ended(api, create(api, upload(api, "a"), output_expires_after=expiry))
        output = api.files.retrieve(batch.output_file_id or "")
        assert output.expires_at == output.created_at + 3600

"""Every accepted shape of a job's input, and the errors for other inputs."""

import base64
from typing import Any

import pytest

from worker.errors import InvalidRequestError, JobError, MethodNotAllowedError, RouteNotFoundError
from worker.request.inputs import ApiCall, JobInput

MESSAGES = [{"role": "user", "content": "Hello"}]
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
PDF = base64.b64encode(b"%PDF-1.7\n" + bytes(40)).decode()
WAV = base64.b64encode(b"RIFF\0\0\0\0WAVEfmt " + bytes(40)).decode()
MP4 = base64.b64encode(b"\x00\x00\x00\x20ftypisom" + bytes(40)).decode()


def chat(**fields: Any) -> ApiCall:
    return ApiCall("POST", "/v1/chat/completions", "", fields)


def user(*content: Any) -> list[Any]:
    return [{"role": "user", "content": list(content)}]


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video_part(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def audio_part(url: str) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}}


def file_part(**fields: str) -> dict[str, Any]:
    return {"type": "file", "file": fields}


def speech(route: str, **fields: Any) -> ApiCall:
    return ApiCall("POST", f"/v1/audio/{route}", "", fields)


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("job_input", "call"),
    [
        pytest.param(
            {"openai_route": "/v1/chat/completions", "openai_input": {"messages": MESSAGES, "stream": True}},
            ApiCall("POST", "/v1/chat/completions", "", {"messages": MESSAGES, "stream": True}),
            id="openai",
        ),
        pytest.param({"openai_route": "/v1/models"}, ApiCall("GET", "/v1/models", "", None), id="openai GET, absent"),
        pytest.param(
            {"openai_route": "/v1/models", "openai_input": None},
            ApiCall("GET", "/v1/models", "", None),
            id="openai GET, null",
        ),
        pytest.param(
            {"openai_route": "/v1/models", "openai_input": {}},
            ApiCall("GET", "/v1/models", "", None),
            id="openai GET, empty",
        ),
        pytest.param(
            {"route": "/tokenize", "body": {"prompt": "a"}},
            ApiCall("POST", "/tokenize", "", {"prompt": "a"}),
            id="route",
        ),
        pytest.param({"route": "/metrics"}, ApiCall("GET", "/metrics", "", None), id="route GET"),
        pytest.param(
            {"route": "v1/responses/resp_1?stream=false"},
            ApiCall("GET", "/v1/responses/resp_1", "stream=false", None),
            id="route with an id and a query, no slash",
        ),
        pytest.param(
            {"route": "/v1/responses/resp_1/cancel", "method": "POST"},
            ApiCall("POST", "/v1/responses/resp_1/cancel", "", {}),
            id="route with a method",
        ),
        pytest.param({"openai_input": {"messages": MESSAGES}}, chat(messages=MESSAGES), id="openai without a route"),
        pytest.param({"route": "/v1/models", "method": "get"}, ApiCall("GET", "/v1/models", "", None), id="lower case"),
        pytest.param({"messages": MESSAGES}, chat(messages=MESSAGES), id="messages"),
        pytest.param(
            {"messages": MESSAGES, "stream": True, "model": "m", "tools": [], "max_tokens": 5},
            chat(messages=MESSAGES, stream=True, model="m", tools=[], max_tokens=5),
            id="messages with OpenAI fields",
        ),
        pytest.param(
            {"messages": MESSAGES, "sampling_params": {"temperature": 0, "max_tokens": 5}, "max_tokens": 7},
            chat(messages=MESSAGES, temperature=0, max_tokens=7),
            id="fields beside sampling_params win",
        ),
        pytest.param(
            {"prompt": "Once", "sampling_params": {"max_tokens": 5}},
            ApiCall("POST", "/v1/completions", "", {"prompt": "Once", "max_tokens": 5}),
            id="prompt",
        ),
        pytest.param(
            {"prompt": [1, 2, 3]},
            ApiCall("POST", "/v1/completions", "", {"prompt": [1, 2, 3]}),
            id="prompt of token ids",
        ),
        pytest.param(
            {"prompt": "Hello", "apply_chat_template": True},
            chat(messages=[{"role": "user", "content": "Hello"}]),
            id="prompt as a chat",
        ),
        pytest.param(
            {"prompt": "What is this?", "image": "https://example.org/a.png"},
            chat(messages=user(image_part("https://example.org/a.png"), text_part("What is this?"))),
            id="image by URL",
        ),
        pytest.param(
            {"prompt": "?", "image": PNG},
            chat(messages=user(image_part(f"data:image/png;base64,{PNG}"), text_part("?"))),
            id="image as bare base64",
        ),
        pytest.param(
            {"prompt": "?", "images": ["data:image/png;base64,AA", PNG], "videos": [MP4]},
            chat(
                messages=user(
                    image_part("data:image/png;base64,AA"),
                    image_part(f"data:image/png;base64,{PNG}"),
                    video_part(f"data:video/mp4;base64,{MP4}"),
                    text_part("?"),
                )
            ),
            id="images and videos",
        ),
        pytest.param(
            {"prompt": "Hello", "apply_chat_template": True, "images": None, "sampling_params": None, "stream": None},
            chat(messages=[{"role": "user", "content": "Hello"}], stream=None),
            id="nulls",
        ),
        pytest.param(
            {"prompt": "?", "video": "http://example.org/a.mp4", "max_tokens": 9},
            chat(messages=user(video_part("http://example.org/a.mp4"), text_part("?")), max_tokens=9),
            id="video",
        ),
        pytest.param(
            {"prompt": "?", "audio": "https://example.org/a.mp3", "audios": [WAV]},
            chat(
                messages=user(
                    audio_part("https://example.org/a.mp3"),
                    audio_part(f"data:audio/wav;base64,{WAV}"),
                    text_part("?"),
                )
            ),
            id="sounds",
        ),
        pytest.param(
            {
                "prompt": "?",
                "document": PDF,
                "documents": ["https://example.org/b.pdf"],
                "pdf": "DATA:application/pdf;base64,AA",
                "pdfs": ["file:///c.pdf"],
            },
            chat(
                messages=user(
                    file_part(file_data=f"data:application/pdf;base64,{PDF}"),
                    file_part(file_url="https://example.org/b.pdf"),
                    file_part(file_data="DATA:application/pdf;base64,AA"),
                    file_part(file_url="file:///c.pdf"),
                    text_part("?"),
                )
            ),
            id="documents",
        ),
        pytest.param(
            {"audio": "https://example.org/a.mp3"},
            speech("transcriptions", file="https://example.org/a.mp3"),
            id="speech by URL",
        ),
        pytest.param(
            {"audio": WAV, "task": "translate", "language": "de", "sampling_params": {"temperature": 0}},
            speech("translations", file=f"data:audio/wav;base64,{WAV}", language="de", temperature=0),
            id="speech to translate, with fields",
        ),
        pytest.param(
            {"audio": WAV, "task": "transcribe", "prompt": "Names: Ada", "stream": True},
            speech("transcriptions", file=f"data:audio/wav;base64,{WAV}", prompt="Names: Ada", stream=True),
            id="speech with a prompt",
        ),
        pytest.param(
            {"prompt": "Once", "task": "other"},
            ApiCall("POST", "/v1/completions", "", {"prompt": "Once", "task": "other"}),
            id="a task without a sound",
        ),
    ],
)
def test_accepted(job_input: dict[str, Any], call: ApiCall) -> None:
    assert JobInput(job_input).call() == call


@pytest.mark.parametrize(
    ("job_input", "message", "param"),
    [
        pytest.param(None, "must be a JSON object, not null", None, id="null"),
        pytest.param("Hello", "must be a JSON object, not a string", None, id="string"),
        pytest.param(["Hello"], "must be a JSON object, not a list", None, id="list"),
        pytest.param(
            {}, "has no keys, which is not an accepted shape. It must have one of 'messages'", None, id="empty"
        ),
        pytest.param({"text": "Hello"}, "has 'text', which is not an accepted shape", None, id="unknown key"),
        pytest.param({"messages": "Hello"}, "Wrong field 'messages'", "messages", id="messages as text"),
        pytest.param({"messages": ["Hello"]}, "Wrong field 'messages[0]'", "messages[0]", id="message as text"),
        pytest.param({"prompt": 7}, "Wrong field 'prompt'", "prompt", id="prompt as number"),
        pytest.param(
            {"prompt": "a", "sampling_params": [1]}, "Wrong field 'sampling_params'", "sampling_params", id="params"
        ),
        pytest.param({"prompt": ["a"], "image": PNG}, "must be a string", "prompt", id="media beside token ids"),
        pytest.param({"prompt": "?", "image": "cat.png"}, "'image' is neither a URL", "image", id="file name"),
        pytest.param({"prompt": "?", "images": [PNG, MP4]}, "contains video/mp4", "images[1]", id="video as image"),
        pytest.param(
            {"messages": MESSAGES, "image": PNG}, "'image' belongs to 'prompt'", "image", id="misplaced image"
        ),
        pytest.param(
            {"messages": MESSAGES, "pdfs": [PDF]},
            """put it into a message's content: {"type": "file", "file": {"file_url": "…"}}.""",
            "pdfs",
            id="misplaced documents",
        ),
        pytest.param({"prompt": "?", "audio": PNG}, "'audio' contains image/png", "audio", id="image as sound"),
        pytest.param({"prompt": "?", "pdf": PNG}, "'pdf' contains image/png", "pdf", id="image as document"),
        pytest.param({"audio": 7}, "Wrong field 'audio'", "audio", id="sound as number"),
        pytest.param({"audio": "a.wav"}, "'audio' is neither a URL", "audio", id="name of a sound"),
        pytest.param(
            {"audio": WAV, "task": "summarize"}, "should be 'transcribe' or 'translate'", "task", id="unknown task"
        ),
        pytest.param(
            {"audio": WAV, "audios": [WAV]}, "'audios' must not stand beside 'audio'", "audios", id="several sounds"
        ),
        pytest.param(
            {"route": "/v1/models", "bdy": {}},
            "Wrong field 'bdy' in the job's input: unknown field; accepted are 'route', 'body', 'method'.",
            "bdy",
            id="misspelt field",
        ),
        pytest.param({"route": "/v1/models", "method": "PUT"}, "'GET' or 'POST'", "method", id="method"),
        pytest.param({"openai_route": 7}, "Wrong field 'openai_route'", "openai_route", id="route as number"),
    ],
)
def test_rejected(job_input: object, message: str, param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        JobInput(job_input).call()
    assert message in str(caught.value)
    assert caught.value.body()["error"] == {
        "message": str(caught.value),
        "type": "BadRequestError",
        "param": param,
        "code": 400,
    }


def test_an_error_does_not_repeat_the_prompt() -> None:
    with pytest.raises(JobError) as caught:
        JobInput({"prompt": {"text": "my secret"}}).call()
    assert "my secret" not in str(caught.value)


CONTROL_ROUTES = [
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/start_profile",
    "/sleep",
    "/scale_elastic_ep",
    "/v1/../sleep",
    "/v1/responses/a/b",
    "/docs",
    "",
]


@pytest.mark.parametrize(
    ("route", "method", "expected"), [("/health", "POST", "GET"), ("/v1/embeddings", "GET", "POST")]
)
def test_another_method_than_the_routes_is_refused(route: str, method: str, expected: str) -> None:
    with pytest.raises(MethodNotAllowedError, match=f"'{route}' does not accept {method}. Use {expected}."):
        JobInput({"route": route, "method": method}).call()


def test_an_empty_body_does_not_change_the_method_of_the_workers_routes() -> None:
    assert JobInput({"route": "/health", "body": {}}).call().method == "GET"


@pytest.mark.parametrize("route", CONTROL_ROUTES)
@pytest.mark.parametrize("key", ["route", "openai_route"])
def test_control_routes_are_not_offered(route: str, key: str) -> None:
    with pytest.raises(RouteNotFoundError, match="/v1/chat/completions") as caught:
        JobInput({key: route}).call()
    assert caught.value.body()["error"]["code"] == 404


def test_control_routes_can_be_allowed() -> None:
    body = {"lora_name": "a", "lora_path": "b"}
    call = JobInput({"route": "/v1/load_lora_adapter", "body": body}).call(control_routes=True)
    assert call == ApiCall("POST", "/v1/load_lora_adapter", "", body)


@pytest.mark.parametrize(
    ("job_input", "form"),
    [
        pytest.param({"openai_route": "/v1/x", "openai_input": {"stream": True}}, "sse", id="openai"),
        pytest.param({"openai_route": "/v1/x", "openai_input": {"stream": False}}, None, id="openai, not streaming"),
        pytest.param({"openai_route": "/v1/x"}, None, id="openai, no body"),
        pytest.param({"route": "/v1/x", "body": {"stream": True}}, "objects", id="route"),
        pytest.param({"messages": 7, "stream": True}, "objects", id="invalid messages"),
        pytest.param({"prompt": "a"}, None, id="prompt"),
        pytest.param({"prompt": "a", "sampling_params": {"stream": True}}, "objects", id="sampling_params"),
        pytest.param({"openai_route": "/v1/x", "openai_input": {"stream": "true"}}, "sse", id="text for true"),
        pytest.param({"openai_route": "/v1/x", "openai_input": {"stream": 1}}, "sse", id="number for true"),
        pytest.param({"prompt": "a", "stream": None}, None, id="null"),
        pytest.param({"prompt": "a", "stream": "perhaps"}, None, id="text that is not a boolean"),
        pytest.param({"audio": "https://example.org/a.wav", "stream": True}, "objects", id="speech"),
        pytest.param("text", None, id="not an object"),
    ],
)
def test_stream_form(job_input: object, form: str | None) -> None:
    assert JobInput(job_input).stream_form == form

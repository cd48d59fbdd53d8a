"""Which paths are of which route."""

import pytest

from worker.request.routes import method_of, route_of


@pytest.mark.parametrize(
    ("path", "route", "method"),
    [
        pytest.param("/v1/chat/completions", "/v1/chat/completions", "POST", id="plain"),
        pytest.param("/v1/responses/resp_1", "/v1/responses/{id}", "GET", id="id"),
        pytest.param("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel", "POST", id="id and more"),
        pytest.param("/v1/responses/a/b", None, None, id="two segments"),
        pytest.param("/v1/chat/completions/", None, None, id="slash"),
        pytest.param("/V1/chat/completions", None, None, id="case"),
        pytest.param("/v1/models\n", None, None, id="line end"),
        pytest.param("/v1/load_lora_adapter", None, None, id="control route"),
    ],
)
def test_routes(path: str, route: str | None, method: str | None) -> None:
    assert (route_of(path), method_of(path)) == (route, method)

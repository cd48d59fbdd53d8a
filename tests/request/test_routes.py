"""The routes of paths, their methods, and their labels in metrics."""

import pytest

from worker.request.routes import label_of, method_of, route_of


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


@pytest.mark.parametrize(
    ("path", "label"),
    [
        pytest.param("/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel", id="inference route"),
        pytest.param("/metrics", "/metrics", id="own route"),
        pytest.param("/v1/load_lora_adapter", "control", id="control route"),
        pytest.param("/../etc/passwd", "control", id="no route"),
        pytest.param("", "control", id="empty"),
    ],
)
def test_labels_are_out_of_a_bounded_set(path: str, label: str) -> None:
    assert label_of(path) == label

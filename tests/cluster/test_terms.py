"""What nodes must have in common, and the words for what they do not."""

import json

import pytest

from worker.cluster import terms

FOLDER = "/volume/models--org--m/snapshots/abc"


def engine(**arguments: object) -> terms.Terms:
    return terms.of_engine({FOLDER: "abc"}, {"model": FOLDER, **arguments}, {"VLLM_X": 1}, 8)


def test_equal_nodes_have_no_differences() -> None:
    assert terms.differences(engine(seed=1, dtype="half"), engine(dtype="half", seed=1)) == []
    assert json.loads(json.dumps(engine()))["MODEL"][1] == "abc"


@pytest.mark.parametrize(
    "own",
    [
        pytest.param({"node_rank": 1, "master_addr": "10.0.0.2"}, id="the place in the cluster"),
        pytest.param({"logging_config": "/tmp/x"}, id="a temporary file"),
        pytest.param({"otlp_traces_endpoint": "http://a"}, id="where traces go"),
    ],
)
def test_some_arguments_may_differ(own: dict[str, object]) -> None:
    assert terms.differences(engine(**own), engine()) == []


def test_variables_that_name_cpu_cores_may_differ() -> None:
    own, other = (terms.of_engine({}, {}, {"VLLM_CPU_OMP_THREADS_BIND": cores}, 1) for cores in ("0", "1"))
    assert terms.differences(own, other) == []


def test_the_same_snapshot_may_be_in_another_folder() -> None:
    nested = {"speculative_config": {"model": "/here"}, "x": ["/here"]}
    other = {"speculative_config": {"model": "/there"}, "x": ["/there"]}
    assert terms.of_engine({"/here": "abc"}, nested, {}, 1) == terms.of_engine({"/there": "abc"}, other, {}, 1)


@pytest.mark.parametrize(
    ("own", "other", "line"),
    [
        pytest.param({"worker": "0.3.0"}, {"worker": "0.2.0"}, "worker: 0.3.0 here, 0.2.0 on the head", id="a release"),
        pytest.param({"GPUs": 8}, {"GPUs": 4}, "GPUs: 8 here, 4 on the head", id="a number"),
        pytest.param({"A": True}, {}, "A: true here, not set on the head", id="a value that one node lacks"),
        pytest.param({}, {"A": {"b": [1]}}, 'A: not set here, {"b": [1]} on the head', id="an object"),
        pytest.param({"A": "x\ny"}, {"A": "z"}, "A: x y here, z on the head", id="several lines"),
    ],
)
def test_a_difference_in_words(own: dict[str, object], other: dict[str, object], line: str) -> None:
    assert terms.differences(terms.of(own), terms.of(other)) == [line]


def test_both_sides_name_the_places() -> None:
    own, other = engine(mm_encoder_tp_mode="data"), engine(mm_encoder_tp_mode="weights")
    assert terms.differences(own, other) == ["MM_ENCODER_TP_MODE: data here, weights on the head"]
    assert terms.differences(other, own, "on node 1", "here") == ["MM_ENCODER_TP_MODE: weights on node 1, data here"]


def test_long_values_that_begin_alike_are_told_apart() -> None:
    own, other = (terms.of({"TEMPLATE": "x" * 1000 + end}) for end in "ab")
    (line,) = terms.differences(own, other)
    assert line == f"TEMPLATE: the value here differs from the one on the head; both are shown as {'x' * 120}…"


def test_nothing_secret_is_compared_or_shown() -> None:
    values = {"hf_token": "s3cret", "config": {"api_key": "s3cret"}, "URL": "https://example.org/s3cret?key=s3cret"}
    own = terms.of(values)
    assert "s3cret" not in str(own)
    changed = {**values, "hf_token": "other", "config": {"api_key": "other"}}
    assert terms.differences(own, terms.of(changed)) == []
    assert "a URL" in terms.differences(own, terms.of({**values, "URL": "x"}))[0]

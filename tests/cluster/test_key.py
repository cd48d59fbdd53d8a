"""The key that proves that a node belongs to the cluster."""

from worker.cluster.key import shared_key


def test_the_key_of_the_cluster_comes_first() -> None:
    assert shared_key("k3y", ["a"]) == shared_key("k3y", []) == b"k3y"


def test_without_it_the_key_is_derived_from_the_callers_keys() -> None:
    derived = shared_key(None, ["a", "b"])
    assert derived == shared_key(None, ["a", "b"])
    assert derived not in (b"", shared_key(None, ["a"]), shared_key(None, ["b", "a"]))
    assert derived != b"a"


def test_without_any_key_it_is_empty() -> None:
    assert shared_key(None, []) == b""

"""The set of ids that were seen."""

import tracemalloc
from hashlib import blake2b

from worker.batch.duplicates import Seen


def test_an_id_is_new_once() -> None:
    seen = Seen()
    assert [seen.add(text) for text in ("a", "b", "a", "", "\ud800", "b", "")] == [
        True,
        True,
        False,
        True,
        True,
        False,
        False,
    ]


def test_other_ids_are_never_taken_for_duplicates() -> None:
    seen = Seen()
    assert all(seen.add(f"request-{number}") for number in range(200_000))
    assert not any(seen.add(f"request-{number}") for number in range(0, 200_000, 97))


def test_a_hash_is_not_found_across_two_others() -> None:
    digest = blake2b(b"a", digest_size=8).digest()
    for shift in range(1, 6):
        seen = Seen()
        pair = bytes(shift) + digest[2:] + bytes(6 - shift)
        seen._shards[int.from_bytes(digest[:2], "big")] = pair
        assert seen.add("a")
        assert not seen.add("a")


def test_a_hundred_thousand_ids_take_little_memory() -> None:
    tracemalloc.start()
    try:
        seen = Seen()
        for number in range(100_000):
            seen.add(f"request-{number}")
        assert tracemalloc.get_traced_memory()[0] < 6_000_000
    finally:
        tracemalloc.stop()

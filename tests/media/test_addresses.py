"""Public addresses. Private ones are tested in `test_fetch.py`."""

import pytest

from worker.media.addresses import is_public


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("not an address", False),
    ],
)
def test_public_addresses_are_recognised(address: str, public: bool) -> None:
    assert is_public(address) is public

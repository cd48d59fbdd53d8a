"""The key that the nodes of a cluster share."""

import hashlib
from collections.abc import Iterable


def shared_key(cluster_key: str | None, api_keys: Iterable[str]) -> bytes:
    """Return the key, derived from the keys of HTTP callers if there is no `cluster_key`; empty without any key."""
    if cluster_key is None and (keys := "\n".join(api_keys)):
        return hashlib.sha256(f"cluster\n{keys}".encode()).digest()
    return (cluster_key or "").encode()

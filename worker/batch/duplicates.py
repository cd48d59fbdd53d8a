"""Which `custom_id`s were seen, in about ten bytes each."""

from hashlib import blake2b
from threading import Lock

_SHARDS = 1 << 16


class Seen:
    """A set of texts that keeps a hash of 64 bits of each.

    Two different texts among a million have the same hash once in 40 million batches. The later one would then be taken
    for a duplicate. The hash is the same in every process, so a batch that goes on has the same verdicts.

    The first 16 bits choose a shard, a string of the other 48 bits of its texts. So there is no table that is copied
    when it grows.
    """

    def __init__(self) -> None:
        self._shards = [b""] * _SHARDS
        self._lock = Lock()

    def add(self, text: str) -> bool:
        """Add a text. Return False if it was there before."""
        digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        shard, rest = int.from_bytes(digest[:2], "big"), digest[2:]
        with self._lock:
            known = self._shards[shard]
            at = known.find(rest)
            while at > 0 and at % len(rest):
                # These are the end of one hash and the beginning of the next.
                at = known.find(rest, at + 1)
            if at >= 0:
                return False
            self._shards[shard] = known + rest
            return True

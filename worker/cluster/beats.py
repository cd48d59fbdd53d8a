"""When each node was last heard, and which one has been silent for too long. Pure: the time is an argument."""

BEAT_SECONDS = 0.5
SILENCE_SECONDS = 8.0
"""A node that is silent for longer is lost.

Measured over a pair of virtual network cards: a card that is down for 5 s causes a silence of 5.6 s, and a network that
drops all packets for 5 s one of up to 7.6 s, because TCP repeats them after waits that double.
"""
PAUSE_SECONDS = 2.0
"""If this process notices the time so late, it was paused itself, and has not read what the others sent."""


class Hearing:
    """Counts the silence of each node, without the time for which this process itself was paused."""

    def __init__(self, now: float, silence: float = SILENCE_SECONDS) -> None:
        self.silence = silence
        self._ticked = now
        self._heard: dict[int, float] = {}

    def heard(self, rank: int, now: float) -> None:
        """Note that a node was heard."""
        self._heard[rank] = now

    def forget(self, rank: int) -> None:
        """Stop waiting for a node."""
        self._heard.pop(rank, None)

    def silent(self, now: float) -> list[int]:
        """Return the nodes that are silent for too long. Call it every `BEAT_SECONDS`."""
        pause = now - self._ticked
        self._ticked = now
        if pause > PAUSE_SECONDS:
            self._heard = {rank: min(now, heard + pause) for rank, heard in self._heard.items()}
        return [rank for rank, heard in self._heard.items() if now - heard > self.silence]

    def seconds(self, rank: int, now: float) -> float:
        """Return for how long a node has been silent; 0.0 if nobody waits for it."""
        return round(now - self._heard.get(rank, now), 1)

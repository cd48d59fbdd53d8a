"""The head's view: nodes in any order, duplicates, restarts, silence, differences, and random schedules of all that."""

import random

import pytest

from worker.cluster import terms
from worker.cluster.beats import BEAT_SECONDS, SILENCE_SECONDS, Hearing
from worker.cluster.roster import Drop, End, Event, Go, Loss, Refuse, Reject, Roster, Stopping, Welcome
from worker.cluster.terms import Terms
from worker.cluster.wire import Join

VERSIONS = terms.of({"vllm": "0.32.0"})
TERMS = terms.of({"DTYPE": "bfloat16"})
OTHER_TERMS = terms.of({"DTYPE": "float16"})
TIMEOUT = 600.0


def join(rank: int, nodes: int = 3, versions: Terms = VERSIONS, last: int | None = None) -> Join:
    return Join(rank, nodes, f"10.0.0.{(rank if last is None else last) + 1}", 40000, "8 x H100", versions)


def roster(nodes: int = 3) -> Roster:
    return Roster(join(0, nodes), TIMEOUT, now=0.0)


def joined(nodes: int = 3) -> Roster:
    """Return a roster that all nodes have joined at 1 s."""
    one = roster(nodes)
    for rank in range(1, nodes):
        one.joined(join(rank, nodes), 1.0)
    return one


def agreed(nodes: int = 3) -> Roster:
    one = joined(nodes)
    for rank in range(nodes):
        one.agreed(rank, TERMS)
    return one


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_nodes_join_in_any_order(order: tuple[int, int]) -> None:
    one = roster()
    assert one.joined(join(order[0]), 1.0) == []
    assert one.joined(join(order[1]), 2.0) == [Welcome({rank: (f"10.0.0.{rank + 1}", 40000) for rank in range(3)})]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nodes_agree_in_any_order_once_all_have_said_their_terms(order: tuple[int, int, int]) -> None:
    one = joined()
    assert [one.agreed(rank, TERMS) for rank in order] == [[], [], [Go()]]
    assert one.stage == "agreed"


def test_terms_may_come_before_all_have_joined() -> None:
    one = roster()
    one.joined(join(1), 1.0)
    assert one.agreed(0, TERMS) == []
    assert one.agreed(1, TERMS) == []
    assert len(one.joined(join(2), 2.0)) == 1
    assert one.agreed(2, TERMS) == [Go()]


def test_a_second_node_with_the_same_rank_is_told_so_and_may_try_again() -> None:
    one = roster()
    one.joined(join(1), 1.0)
    [refusal] = one.joined(join(1, last=5), 2.0)
    reason = "Node 1 has joined already, from 10.0.0.2. Each node needs a NODE_RANK of its own."
    assert refusal == Refuse(1, [reason], again=True)
    assert one.stage == "joining"


@pytest.mark.parametrize("rank", [0, 3, -1])
def test_a_rank_that_no_follower_has_is_refused(rank: int) -> None:
    one = roster()
    [refusal] = one.joined(join(rank), 1.0)
    assert isinstance(refusal, Refuse)
    assert one.stage == "joining"


def test_a_node_that_goes_before_all_have_joined_may_come_again() -> None:
    one = roster()
    one.joined(join(1), 1.0)
    assert one.gone(1, "was lost") == [Drop(1, "was lost")]
    assert one.joined(join(1), 2.0) == []
    assert one.joined(join(2), 3.0)


def test_nodes_that_do_not_come_in_time_are_named() -> None:
    one = roster()
    one.joined(join(2), 590.0)
    one.turned_away("10.0.0.2", "its key is wrong")
    one.heard(2, 600.0)
    assert one.tick(600.0) == []
    what = "has not come within CLUSTER_TIMEOUT=600 s (10.0.0.2 was refused: its key is wrong)"
    assert one.tick(600.5) == [End(Loss("node 1 of 3", what))]
    assert one.tick(601.0) == []


def test_versions_that_differ_are_refused_on_both_sides_before_anything_is_downloaded() -> None:
    one = roster()
    events = one.joined(join(1, versions=terms.of({"vllm": "0.31.0"})), 1.0)
    assert events == [
        Refuse(1, ["vllm: 0.31.0 here, 0.32.0 on the head"], again=False),
        Reject("node 1 (10.0.0.2) does not match the head: vllm: 0.32.0 here, 0.31.0 on node 1 (10.0.0.2)."),
    ]
    [later] = one.joined(join(2), 2.0)
    assert isinstance(later, Refuse)
    assert not later.again
    assert "The head takes no nodes until it is started again. It said: node 1" in later.reasons[0]


def test_terms_that_differ_are_refused_on_both_sides() -> None:
    one = joined()
    one.agreed(1, OTHER_TERMS)
    one.agreed(2, TERMS)
    assert one.agreed(0, TERMS) == [
        Refuse(1, ["DTYPE: float16 here, bfloat16 on the head"], again=False),
        Reject("node 1 (10.0.0.2) does not match the head: DTYPE: bfloat16 here, float16 on node 1 (10.0.0.2)."),
    ]


def test_a_node_that_comes_late_with_other_settings_does_not_end_a_running_cluster() -> None:
    one = agreed()
    for late in (join(1, nodes=2), join(1, versions=terms.of({"vllm": "0.31.0"})), join(5)):
        [refusal] = one.joined(late, 9.0)
        assert isinstance(refusal, Refuse)
    assert one.stage == "agreed"


def test_a_lost_node_ends_the_cluster_once() -> None:
    one = agreed()
    assert one.gone(2, "was lost: it closed the connection") == [
        End(Loss("node 2 (10.0.0.3)", "was lost: it closed the connection"))
    ]
    assert one.gone(1, "was lost") == []
    assert one.agreed(1, OTHER_TERMS) == []


def test_a_silent_node_is_lost_after_the_limit() -> None:
    one = agreed()
    events, silent = [], 0.0
    for number in range(100):
        time = 1.5 + number * BEAT_SECONDS
        one.heard(1, time)
        if events := one.tick(time):
            silent = time - 1.0
            break
    assert events == [End(Loss("node 2 (10.0.0.3)", "was lost: it sent nothing for 8 s"))]
    assert SILENCE_SECONDS < silent <= SILENCE_SECONDS + BEAT_SECONDS


def test_a_node_that_is_stopped_is_announced_and_named_at_its_end() -> None:
    one = agreed()
    assert one.leaving(1, "was stopped") == [Stopping("node 1 (10.0.0.2)")]
    assert one.leaving(1, "was stopped") == []
    assert one.gone(1, "was lost: it closed the connection") == [End(Loss("node 1 (10.0.0.2)", "was stopped"))]


def test_a_node_that_fails_says_why() -> None:
    one = agreed()
    assert one.leaving(1, "has failed: its engine has died") == [
        End(Loss("node 1 (10.0.0.2)", "has failed: its engine has died"))
    ]


def test_after_the_end_of_the_head_nothing_is_a_loss() -> None:
    one = agreed()
    one.close()
    assert one.gone(1, "was lost") == []
    assert one.tick(100.0) == []


def test_the_description_has_all_nodes() -> None:
    one = roster()
    one.joined(join(2), 1.0)
    one.heard(2, 2.0, "loading")
    assert one.describe(3.5, "downloading") == [
        {"rank": 0, "address": "10.0.0.1", "phase": "downloading", "heard_seconds": 0.0},
        {"rank": 2, "address": "10.0.0.3", "phase": "loading", "heard_seconds": 1.5},
    ]


def test_a_pause_of_this_process_is_no_silence_of_the_others() -> None:
    hearing = Hearing(0.0)
    hearing.heard(1, 0.0)
    assert hearing.silent(1.0) == []
    # Paused for 19 s. What the other node sent meanwhile is read after this.
    assert hearing.silent(20.0) == []
    assert hearing.seconds(1, 20.0) == 1.0
    ticks = [20.0 + number * BEAT_SECONDS for number in range(1, 20)]
    assert next(tick for tick in ticks if hearing.silent(tick)) == 27.5


class Schedule:
    """A random cluster: nodes join, restart, send terms, beat, fall silent and end, and time passes."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.nodes = self.chance.choice([2, 3, 4])
        self.roster = roster(self.nodes)
        self.now = 0.0
        self.connected: set[int] = set()
        self.terms: dict[int, Terms] = {}
        self.heard: dict[int, float] = {}
        self.events: list[Event] = []

    def step(self) -> None:
        rank = self.chance.randrange(1, self.nodes)
        action = self.chance.choice(["join", "join", "terms", "own terms", "beat", "beat", "gone", "leave", "time"])
        before = self.roster.stage
        events: list[Event] = []
        if action == "join":
            events = self.join(rank)
        elif action == "own terms":
            self.terms[0] = TERMS
            events = self.roster.agreed(0, TERMS)
        elif action == "time":
            events = self.pass_time()
        elif rank in self.connected:
            events = self.act(action, rank)
        self.check(before, events)

    def join(self, rank: int) -> list[Event]:
        events = self.roster.joined(join(rank, self.nodes), self.now)
        refused = any(isinstance(event, Refuse) for event in events)
        assert refused == (rank in self.connected or self.roster.stage == "over" or len(self.connected) == self.nodes)
        if not refused:
            self.connected.add(rank)
            self.heard[rank] = self.now
        return events

    def act(self, action: str, rank: int) -> list[Event]:
        if action == "terms":
            self.terms[rank] = self.chance.choice([TERMS] * 9 + [OTHER_TERMS])
            return self.roster.agreed(rank, self.terms[rank])
        if action == "beat":
            self.heard[rank] = self.now
            self.roster.heard(rank, self.now, "loading")
            return []
        if self.chance.random() < 0.7:
            return []
        return self.roster.gone(rank, "was lost") if action == "gone" else self.roster.leaving(rank, "was stopped")

    def pass_time(self) -> list[Event]:
        events: list[Event] = []
        for _ in range(self.chance.randint(1, 6)):
            self.now += BEAT_SECONDS
            events += self.roster.tick(self.now)
        return events

    def check(self, before: str, events: list[Event]) -> None:
        """Check what the events say against what has happened."""
        self.events += events
        for event in events:
            match event:
                case Drop(rank, _):
                    assert before == "joining"
                    self.connected.discard(rank)
                    self.terms.pop(rank, None)
                case Welcome(peers):
                    assert set(peers) == {0, *self.connected} == set(range(self.nodes))
                case Go():
                    assert dict.fromkeys(range(self.nodes), TERMS) == self.terms
                case Refuse(rank, reasons, again):
                    assert reasons
                    assert again or before == "over" or self.terms[rank] == OTHER_TERMS
                case End(loss):
                    assert before != "over"
                    assert str(loss)
        ends = [event for event in self.events if isinstance(event, End | Reject)]
        assert len(ends) == (self.roster.stage == "over")
        assert sum(isinstance(event, Go) for event in self.events) <= 1
        if self.roster.stage != "over":
            assert all(self.now - self.heard[rank] <= SILENCE_SECONDS for rank in self.connected)


def test_random_schedules() -> None:
    reached = set()
    for seed in range(300):
        schedule = Schedule(seed)
        for _ in range(80):
            schedule.step()
        reached |= {type(event) for event in schedule.events}
    assert reached == {Welcome, Go, Refuse, Reject, Drop, Stopping, End}

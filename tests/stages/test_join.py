"""How far vectors can be decided, against a plain oracle, over any interleaving of votes and vectors."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.store import Committed
from worker.stages.join import Heard, Joined, Patience, join

AGENTS = ("xgboost", "lightgbm")
CANARY = "xgboost_canary"


def vote_id(number: int) -> str:
    """IDs whose order as text is not that of the numbers."""
    return f"{number // 3 + 8}-{number % 3}"


def naive(ready: list[bool], votes: Mapping[str, set[int]], absent: frozenset[str]) -> Joined:
    """One vector after another: who voted, who can no more, who is waited for. Everything is known of the streams."""
    taken, missing = 0, {agent: set() for agent in AGENTS}
    for number, is_ready in enumerate(ready):
        waiting = set()
        without = set()
        for agent in AGENTS:
            if not is_ready or number in votes[agent]:
                continue
            without.add(agent)
            if agent not in absent and not any(later > number for later in votes[agent]):
                waiting.add(agent)
        if waiting:
            return Joined(taken, {a: frozenset(m) for a, m in missing.items() if m}, frozenset(waiting))
        for agent in without:
            missing[agent].add(number)
        taken += 1
    return Joined(taken, {a: frozenset(m) for a, m in missing.items() if m})


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[bool], dict[str, set[int]], frozenset[str]]:
    ready = draw(st.lists(st.booleans(), max_size=12))
    voted = [number for number, is_ready in enumerate(ready) if is_ready]
    votes = {agent: set(draw(st.lists(st.sampled_from(voted), unique=True))) if voted else set() for agent in AGENTS}
    return ready, votes, frozenset(draw(st.sets(st.sampled_from(AGENTS))))


def heard_of(votes: set[int], most: int = 1 << 20) -> Heard:
    ids = [vote_id(number) for number in sorted(votes)]
    return Heard(ids[:most], more=len(ids) >= most)


@given(scenes())
@settings(max_examples=300, deadline=None)
def test_what_is_decided_is_what_a_plain_loop_decides(scene) -> None:
    ready, votes, absent = scene
    vectors = [(vote_id(number), is_ready) for number, is_ready in enumerate(ready)]
    assert join(vectors, {a: heard_of(v) for a, v in votes.items()}, absent) == naive(ready, votes, absent)


class Streams:
    """Vectors and votes as they come in, and a reader that decides what it can, `most` entries of a stream a look."""

    def __init__(self, ready: list[bool], with_canary: set[int]) -> None:
        self.ready, self.with_canary = ready, with_canary
        self.left = {agent: [n for n, is_ready in enumerate(ready) if is_ready] for agent in AGENTS}
        self.votes: dict[str, list[int]] = {**{agent: [] for agent in AGENTS}, CANARY: []}
        self.written = self.decided = 0

    def step(self, what: str | int) -> None:
        if what == "vector":
            self.written = min(self.written + 1, len(self.ready))
        elif isinstance(what, int):
            self.look(what)
        elif self.left[what] and self.left[what][0] < self.written:
            number = self.left[what].pop(0)
            self.votes[what].append(number)
            if what == "xgboost" and number in self.with_canary:
                self.votes[CANARY].append(number)

    def look(self, most: int) -> None:
        first = self.decided
        vectors = [(vote_id(n), self.ready[n]) for n in range(first, self.written)][:most]
        heard = {a: heard_of({n for n in s if n >= first}, most) for a, s in self.votes.items() if s or a != CANARY}
        joined = join(vectors, heard, frozenset())
        assert not joined.missing, "nobody was late"
        for number in range(first, first + joined.taken):
            canary = CANARY in heard and vote_id(number) in heard[CANARY].known
            assert canary == (number in self.with_canary), f"the canary's vote on {number} was passed over"
        self.decided += joined.taken


@given(
    st.lists(st.booleans(), min_size=1, max_size=10),
    st.sets(st.integers(0, 9)),
    st.lists(st.sampled_from(["vector", *AGENTS, 1, 2, 3]), max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_votes_in_any_order_and_reads_of_any_size_miss_no_vote(ready, canary, steps) -> None:
    """Each agent commits in the order of the vectors, the agents among one another in any."""
    streams = Streams(ready, {n for n in canary if n < len(ready) and ready[n]})
    for step in steps:
        streams.step(step)
    for step in [*["vector"] * 10, *["xgboost"] * 10, *["lightgbm"] * 10, *[1] * 10]:
        streams.step(step)
    assert streams.decided == len(ready)


def test_a_vote_on_a_later_vector_says_that_none_on_this_one_comes() -> None:
    heard = {"xgboost": Heard(["9-0", "9-1"]), "lightgbm": Heard(["9-1"])}
    assert join([("9-0", True), ("9-1", True)], heard, frozenset()) == Joined(2, {"lightgbm": frozenset({0})})


@pytest.mark.parametrize("silent_s", [1.9, 2.0])
def test_an_agent_is_late_after_the_deadline_without_a_commit(silent_s: float) -> None:
    patience, waiting = Patience(2.0, 5.0), frozenset({"nhits"})
    assert not patience.overdue(10.0, waiting, {"nhits": Committed(5)})
    assert not patience.overdue(11.0, waiting, {"nhits": Committed(6)}), "it has just committed"
    assert not patience.overdue(11.5, waiting, {"nhits": Committed(6)})
    assert patience.left_s() == 1.5
    late = patience.overdue(11.0 + silent_s, waiting, {"nhits": Committed(6)})
    assert late == (waiting if silent_s >= 2.0 else frozenset())


def test_the_clock_of_an_agent_starts_when_a_vector_waits_for_it() -> None:
    patience = Patience(2.0, 5.0)
    assert not patience.overdue(0.0, frozenset({"nhits"}), {})
    assert not patience.overdue(1.0, frozenset(), {}), "its vote came"
    assert not patience.overdue(2.5, frozenset({"nhits"}), {}), "another vector waits, since now"
    assert patience.overdue(4.5, frozenset({"nhits"}), {}) == {"nhits"}


def test_only_time_that_was_watched_makes_an_agent_late() -> None:
    patience, waiting = Patience(2.0, 0.5), frozenset({"nhits"})
    assert not patience.overdue(0.0, waiting, {})
    assert not patience.overdue(3600.0, waiting, {}), "the machine stood still: half a second of it was watched"
    assert patience.left_s() == 1.5
    looks = [patience.overdue(3600.0 + n * 0.5, waiting, {}) for n in (1, 2, 3)]
    assert looks == [frozenset(), frozenset(), waiting]
    patience.forget()
    assert not patience.overdue(3602.0, waiting, {}), "after an outage everybody has the whole deadline again"
    assert patience.left_s() == 2.0

"""What the log says of the ensemble and its agents: whether there can be a signal, and why not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from tests.worker.orders import Desk, market
from tests.worker.test_qsc import T0, rows_of, vectors_and_ballot
from worker.logs import make_logger

BARS = market(2, 100)
WARM_UP = 58
"""Bars of both symbols before the first vector is ready."""


class Told:
    """A worker over streams in memory, with its log."""

    def __init__(self, desk: Callable[..., Desk], **settings: Any) -> None:
        self._out = io.StringIO()
        self._read = 0
        self.desk = desk(log=make_logger(stream=self._out), **settings)

    def lines(self, of: str) -> list[tuple[str, str]]:
        """Level and text of what was said since the last call of what begins with `of`."""
        said = [json.loads(line) for line in self._out.getvalue().splitlines()]
        new, self._read = said[self._read :], len(said)
        return [(line["level"], line["event"]) for line in new if line["event"].startswith(of)]

    def facts(self, agent: str) -> dict[str, str]:
        return dict(self.desk.worker.status.readiness().agents[agent])


def test_agents_that_wait_for_their_history_are_warming_up_until_all_have_it(desk, versions):
    told = Told(desk)
    counts = "2 configured, 2 loaded, 0 eligible, quorum 2"
    assert told.lines("ensemble") == [("info", f"ensemble warming up: {counts}")]
    told.desk.feed(BARS[: WARM_UP + 2])
    assert told.lines("ensemble") == [("info", "ensemble ready: 2 configured, 2 loaded, 2 eligible, quorum 2")]


def test_muted_agents_leave_it_below_quorum_and_the_log_names_each_with_its_reason(desk, versions):
    """Both are loaded, none is warming up, and every signal is HOLD."""
    told = Told(desk)
    told.desk.feed(BARS[:80])
    told.lines("ensemble")
    told.desk.order("mute", "xgboost")
    ((level, line),) = told.lines("ensemble")
    assert level == "warning"
    assert line == (
        "ensemble below quorum: 2 configured, 2 loaded, 1 eligible, quorum 2: "
        "every signal will be HOLD below_quorum: xgboost muted operator"
    )
    told.desk.feed(BARS[80:90])
    assert told.desk.signals()[-1]["status"] == "below_quorum"


def test_a_refused_agent_that_is_needed_leaves_it_below_quorum_before_any_bar(desk, versions, models):
    for file in models.glob("lightgbm*"):
        file.unlink()
    told = Told(desk)
    ((level, line),) = told.lines("ensemble")
    assert level == "warning"
    assert line.startswith("ensemble below quorum: 2 configured, 1 loaded, 0 eligible, quorum 2: ")
    assert line.endswith(": xgboost warming_up insufficient_history; lightgbm refused no_artifact")


def test_where_only_the_reason_changes_the_log_and_readyz_say_the_new_one(desk, versions):
    """Muted by the safeguard, then by an operator too: it is the operator who has to end it."""
    told = Told(desk, quality={"minimum": 20, "action_share": 0.3, "hold_share": 0.3})
    told.desk.feed(BARS)
    first = told.facts("xgboost")
    assert (first["state"], first["reason"]) in {("muted", "action_collapse"), ("muted", "dead_zone")}
    told.lines("agent is")
    told.desk.order("mute", "xgboost")
    second = told.facts("xgboost")
    assert (second["state"], second["reason"]) == ("muted", "operator")
    assert told.lines("agent is") == [("info", "agent is muted")]


def test_readyz_says_which_muted_agent_only_an_operator_brings_back(desk, versions):
    """Re-admitted by itself until that is used up, and then not any more: the state and the reason are the same."""
    told = Told(desk)
    told.desk.feed(BARS[:80])
    guard = told.desk.worker.pipeline.safeguard
    once = rows_of("nan", 20, 1) + rows_of("healthy", 500, 2)
    for place in range(4):
        vectors, ballot = vectors_and_ballot(once[:30], [T0 + (place * 520 + i) * 30_000 for i in range(30)], "xgboost")
        guard.watch(vectors, [ballot])
        told.desk.worker._tell_agents()
        assert (told.facts("xgboost")["state"], told.facts("xgboost")["detail"]) == ("muted", "")
        vectors, ballot = vectors_and_ballot(
            once[30:], [T0 + (place * 520 + i) * 30_000 for i in range(30, 520)], "xgboost"
        )
        guard.watch(vectors, [ballot])
        told.desk.worker._tell_agents()
        assert told.facts("xgboost")["state"] == ("muted" if place == 3 else "active")
    facts = told.facts("xgboost")
    assert (facts["reason"], facts["detail"]) == (
        "non_finite_output",
        "only `quartet models unmute xgboost` brings it back",
    )


def test_readyz_says_that_only_an_operator_ends_an_operators_mute(desk, versions):
    told = Told(desk)
    told.desk.feed(BARS[:80])
    told.desk.order("mute", "xgboost")
    told.desk.restart()
    facts = told.facts("xgboost")
    assert (facts["state"], facts["reason"]) == ("muted", "operator")
    assert facts["detail"] == "only `quartet models unmute xgboost` brings it back"

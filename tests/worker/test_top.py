"""The live view is made of what the worker says and of nothing else; what is past its limit is marked."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from streams.messages import Action, AgentState, Status
from worker.metrics import Metrics
from worker.quality import QualityLimits
from worker.top import Frame, Samples, frame, parse_readiness, render

READINESS: dict[str, Any] = {
    "ready": False,
    "conditions": {"redis": {"ok": True, "detail": ""}, "quorum": {"ok": False, "detail": "2 voting, quorum 3"}},
    "counts": {"configured": 4, "loaded": 3, "eligible": 2, "voting": 2, "agreeing": 1},
    "agents": {
        "xgboost": {"state": "active", "reason": "", "version": "20260101_000000", "detail": ""},
        "lightgbm": {"state": "active", "reason": "", "version": "20260102_000000", "detail": ""},
        "nhits": {"state": "muted", "reason": "dead_zone", "version": "20260103_000000", "detail": ""},
        "patchtst": {"state": "refused", "reason": "scaler_missing", "version": "", "detail": "no scaler"},
    },
}
VOTES = {
    "xgboost": {"action": "BUY", "confidence": 0.71},
    "lightgbm": {"action": "SELL", "confidence": 0.55},
    "nhits": {"action": "HOLD", "confidence": 0.99},
    "patchtst": {"action": "ABSTAIN", "confidence": 0.0},
}
SIGNAL = {"bar_id": "BTC|1m|1767225600000", "action": "HOLD", "confidence": 0.0, "status": "below_quorum"}


@pytest.fixture
def samples() -> Samples:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for agent, facts in READINESS["agents"].items():
        metrics.agent_state(agent, AgentState(facts["state"]))
    metrics.quality("xgboost", top_action=0.72, hold=0.1, stddev=0.049, p10_p90=0.3)
    metrics.quality("nhits", top_action=0.05, hold=0.9, stddev=0.2, p10_p90=0.1)
    metrics.degenerate("nhits", ["dead_zone"])
    metrics.configured_weight("xgboost", 0.3)
    metrics.effective_weight("xgboost", 0.6)
    metrics.scores("xgboost", 480, 0.53, 0.0002, 0.21)
    metrics.scores("consensus", 90, 0.61, 0.0004, 0.2)
    metrics.bars("accepted", 1_000)
    metrics.bars("duplicate", 2)
    metrics.signals(Action.HOLD, Status.BELOW_QUORUM, 900)
    metrics.last_bar(1_767_225_600.0)
    metrics.lag("bars", 7)
    metrics.agreement(0.6, 0.25)
    metrics.drift({"close": 3.25, "volume": 0.5, "rsi_14": 1.5, "macd": 1.25})
    return Samples(generate_latest(registry).decode())


@pytest.fixture
def shown(samples: Samples) -> Frame:
    return frame(READINESS, samples, VOTES, SIGNAL, now_s=1_767_225_642.0, bars_per_s=12.5)


def text_of(
    shown: Frame, width: int = 160, limits: dict[str, QualityLimits] | None = None, colour: bool = False
) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None
    )
    console.print(render(shown, limits or {}))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_headline_is_the_counts_of_readyz(shown: Frame) -> None:
    first, second, *_ = text_of(shown).splitlines()
    assert first.split("   ") == ["4 configured · 3 loaded · 2 eligible · 2 voting", "NOT READY"]
    assert second.strip() == "quorum: 2 voting, quorum 3"


def test_a_row_tells_state_reason_vote_figures_against_limits_hits_and_weights(shown: Frame) -> None:
    lines = {line.split()[0]: " ".join(line.split()) for line in text_of(shown).splitlines() if line.strip()}
    assert lines["xgboost"] == (
        "xgboost active BUY 0.71 72% <= 70% 10% <= 85% 0.049 >= 0.05 0.300 >= 0.12 53% 0.30 -> 0.60 20260101_000000"
    )
    assert lines["nhits"].startswith("nhits muted dead_zone HOLD 0.99 5% <= 70% 90% <= 85%")
    assert lines["patchtst"] == "patchtst refused scaler_missing ABSTAIN - - - - - - -"


def test_bars_signals_ensemble_drift_and_the_last_signal_have_a_line_each(shown: Frame) -> None:
    text = text_of(shown)
    assert "bars     1000 accepted · 2 duplicate · 12.5 bars/s · lag 7 · last bar 42 s ago" in text
    assert "signals  900 HOLD below_quorum" in text
    assert "agreement 60% · BUY against SELL 25% · hits of the signals 61%" in text
    assert "drift    close 3.2, rsi_14 1.5, macd 1.2 fitted deviations away" in text
    assert "last     BTC|1m|1767225600000 HOLD 0.00 below_quorum" in text


def test_a_muted_agent_that_does_not_come_back_by_itself_has_a_line_with_the_remedy(samples: Samples) -> None:
    remedy = "only `quartet models unmute nhits` brings it back"
    locked = {**READINESS["agents"]["nhits"], "detail": remedy}
    readiness = {**READINESS, "agents": {**READINESS["agents"], "nhits": locked}}
    shown = frame(readiness, samples, VOTES, SIGNAL, now_s=1_767_225_642.0)
    assert f"muted    nhits: {remedy}" in [line.rstrip() for line in text_of(shown).splitlines()]
    assert [row.detail for row in shown.agents] == ["", "", remedy, "no scaler"]
    assert "unmute" not in text_of(frame(READINESS, samples, VOTES, SIGNAL, now_s=1_767_225_642.0))


def test_only_what_is_past_its_own_agents_limit_is_red(shown: Frame) -> None:
    red = "\x1b[31m"
    assert f"{red}72% <= 70%" in text_of(shown, colour=True)
    assert f"{red}10% <= 85%" not in text_of(shown, colour=True)
    assert f"{red}0.049 >= 0.05" in text_of(shown, colour=True)
    lenient = {"xgboost": QualityLimits(action_share=0.8, confidence_stddev=0.01)}
    assert f"{red}72% <= 80%" not in text_of(shown, limits=lenient, colour=True)


def test_a_worker_that_knows_nothing_yet_is_shown_too() -> None:
    nothing = Samples(generate_latest(CollectorRegistry()).decode())
    shown = frame({**READINESS, "counts": {}}, nothing, {}, None, now_s=0.0)
    text = text_of(shown)
    assert text.startswith("0 configured · 0 loaded · 0 eligible · 0 voting")
    assert "bars     none yet · lag - · last bar none yet" in text
    assert json.loads(json.dumps(shown.as_json()))["last_signal"] is None


def test_what_answers_with_something_else_is_no_worker() -> None:
    assert parse_readiness(json.dumps(READINESS))["ready"] is False
    for other in ("[]", "{}", "not JSON"):
        with pytest.raises(ValueError):
            parse_readiness(other)

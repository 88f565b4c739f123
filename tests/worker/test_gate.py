"""The quality gate on the recordings: each rule just trips on the very vote, and just does not."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

from streams.messages import Reason
from worker.gate import judge
from worker.quality import CRITERIA, QualityLimits
from worker.stretch import Stretch

FOLDER = Path(__file__).parent.parent / "replay" / "quality"
spec = importlib.util.spec_from_file_location("make_quality_recordings", FOLDER / "make.py")
assert spec is not None
assert spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


RULES = {str(criterion): criterion for criterion in CRITERIA} | {"non_finite_share": Reason.NON_FINITE_OUTPUT}
"""The criterion that each pair of recordings is of; non-finite outputs count in a row, and by their share."""


def recording(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_the_committed_recordings_are_what_their_script_writes() -> None:
    made = {name: make.lines(votes) for name, votes in make.recordings()}
    assert made == {path.stem: path.read_text() for path in FOLDER.glob("*.jsonl")}
    assert set(made) == {f"{rule}_{suffix}" for rule in RULES for suffix in ("trips", "holds")}


@pytest.mark.parametrize("rule", RULES)
def test_votes_that_just_trip_a_rule_fail_for_it_on_the_very_vote(rule: str) -> None:
    votes = recording(f"{rule}_trips")
    verdict = judge("xgboost", votes)
    assert verdict.verdict == "FAIL"
    assert verdict.muted_at == votes[make.EXPECTED[rule]]["bar_id"]
    (finding,) = [f for f in verdict.findings if f.violated]
    assert finding.criterion == RULES[rule]
    assert finding.value is not None
    below = rule in ("flat_confidence", "narrow_range")
    assert finding.value < finding.limit if below else finding.value >= finding.limit


@pytest.mark.parametrize("rule", RULES)
def test_votes_that_just_do_not_trip_a_rule_pass(rule: str) -> None:
    verdict = judge("xgboost", recording(f"{rule}_holds"))
    assert verdict.verdict == ("PASS" if verdict.votes >= 200 else "INSUFFICIENT")
    assert verdict.muted_at == ""
    assert verdict.attempts >= 200
    assert not any(f.violated for f in verdict.findings)


@pytest.mark.parametrize("rule", RULES)
def test_every_limit_is_a_setting(rule: str) -> None:
    """A limit moved a little past the recording's value lets it pass, or trips the one that held."""
    name = dict(
        zip(
            RULES,
            "action_share hold_share confidence_stddev confidence_range constant_run non_finite_run "
            "error_share deadline_share stale_share non_finite_share".split(),
            strict=True,
        )
    )[rule]
    looser = {"confidence_stddev": 0.04, "confidence_range": 0.1, "constant_run": 201, "non_finite_run": 21}
    tighter = {"confidence_stddev": 0.06, "confidence_range": 0.13, "constant_run": 199, "non_finite_run": 19}
    default = getattr(QualityLimits(), name)
    up, down = looser.get(name, default + 0.01), tighter.get(name, default - 0.01)
    assert judge("xgboost", recording(f"{rule}_trips"), QualityLimits(**{name: up})).verdict != "FAIL"
    assert judge("xgboost", recording(f"{rule}_holds"), QualityLimits(**{name: down})).verdict == "FAIL"


def test_199_votes_are_insufficient_whatever_they_say() -> None:
    votes = recording("action_collapse_trips")[:199]
    verdict = judge("xgboost", votes)
    assert (verdict.verdict, verdict.votes, verdict.minimum) == ("INSUFFICIENT", 199, 200)
    assert judge("xgboost", []).verdict == "INSUFFICIENT"


def test_votes_of_a_muted_agent_are_judged_like_any_others() -> None:
    votes = [vote | {"state": "muted", "reason": "dead_zone"} for vote in recording("action_collapse_trips")]
    assert judge("xgboost", votes).verdict == "FAIL"


def test_abstentions_for_want_of_history_or_of_a_model_are_no_attempts() -> None:
    healthy = recording("action_collapse_holds")
    silent = {"action": "ABSTAIN", "confidence": 0.0, "outputs": None}
    short = [vote | silent | {"reason": "insufficient_history"} for vote in healthy[:50]]
    refused = [vote | silent | {"reason": "non_finite_output", "state": "refused"} for vote in healthy[:50]]
    verdict = judge("xgboost", [*short, *refused, *healthy])
    assert (verdict.verdict, verdict.attempts, verdict.votes) == ("PASS", 200, 200)


def test_outputs_that_do_not_vary_are_no_fault_where_the_inputs_do_not_either() -> None:
    votes = recording("constant_output_trips")
    frozen = {vote["bar_id"]: 7 for vote in votes[300:]}
    assert judge("xgboost", votes, fingerprints=frozen).verdict == "PASS"
    apart = {vote["bar_id"]: i for vote, i in zip(votes, itertools.count(), strict=False)}
    assert judge("xgboost", votes, fingerprints=apart).verdict == "FAIL"


def test_a_stretch_tells_inputs_apart_by_what_the_model_reads() -> None:
    votes = recording("constant_output_trips")
    stretch = Stretch(votes)
    for i, vote in enumerate(votes):
        values = {"close": 7.0 if i >= 300 else float(i), "volume": float(i), "ema_50": None}
        stretch.add({name: vote[name] for name in ("symbol", "interval", "ts")} | {"values": values})

    def verdict(features: list[str]) -> str:
        return judge("xgboost", votes, fingerprints=stretch.fingerprints(features)).verdict

    assert verdict(["close"]) == "PASS", "what it reads stands still while its output does"
    assert verdict(["close", "volume"]) == "FAIL"
    assert verdict([]) == "FAIL", "nothing is known of what it reads: all counts"
    assert verdict(["close", "rsi_14"]) == "FAIL", "not everything that it reads is there: all counts"

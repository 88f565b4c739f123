"""A recording of stages is computed again: lateness is taken from it, votes are compared whether late or not."""

from __future__ import annotations

import json

import pytest

from streams.keys import agent_stage
from streams.messages import AGENTS
from streams.recording import Recorded
from tests.chaos.scene import market
from tests.replay.scene import Scene, rewrite
from worker.errors import CheckFailed
from worker.logs import make_logger
from worker.service import Options
from worker.serving import serve

SYMBOLS, BARS = 3, 130
FIRST, LATE = 300, 345
"""lightgbm is stopped while the bars between these two are decided."""


def work(scene: Scene, *stages: str, **changed: object) -> None:
    """Let stages use up their input, one after another."""
    for stage in stages:
        settings = scene.settings(**{"deadline_s": 600.0, **changed})
        serve(settings, Options(until_idle_s=0.3), make_logger("error"), stage)


@pytest.fixture(scope="module")
def recorded(models, valkey, tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    scene = Scene(valkey, f"split{folder.name}", models, folder)
    bars = market(SYMBOLS, BARS)
    agents = [agent_stage(agent) for agent in AGENTS]
    scene.feed(bars[:FIRST])
    work(scene, "features", *agents, "consensus")
    scene.feed(bars[FIRST:LATE], FIRST)
    others = [stage for stage in agents if stage != "agent:lightgbm"]
    work(scene, "features", *others)
    work(scene, "consensus", deadline_s=0.3)
    scene.feed(bars[LATE:], LATE)
    work(scene, "features", *agents, "consensus")
    file = folder / "day.qrec"
    scene.record(file)
    return scene, file


def test_what_stages_did_is_computed_again_to_the_bit_and_lateness_is_taken_over(recorded):
    scene, file = recorded
    verdict = scene.verify(file)
    assert verdict.ok, verdict.as_json()
    assert verdict.comparison.tolerance == 0.0
    compared, ready = verdict.comparison.compared, SYMBOLS * (BARS - 29)
    assert compared["features"] == SYMBOLS * BARS
    assert {compared[stream] for stream in ("votes:lightgbm", "votes:nhits", "signals")} == {ready}


def is_late(vote):
    """Decided without; a vote that is muted for it has an action, and the same reason."""
    return vote["action"] == "ABSTAIN" and vote["reason"] == "deadline_missed"


def test_a_late_vote_that_was_altered_is_found(recorded, tmp_path):
    """The signals do not hold it: it is compared all the same, as what the agent said."""
    scene, file = recorded
    signals = rewrite_votes = 0

    def change(item):
        nonlocal signals, rewrite_votes
        if isinstance(item, Recorded) and item.stream == "signals":
            signals += is_late(json.loads(item.fields[b"data"])["votes"]["lightgbm"])
            return [item]
        if isinstance(item, Recorded) and item.stream == "votes:lightgbm" and not rewrite_votes:
            vote = json.loads(item.fields[b"data"])
            if int(item.id.partition("-")[0]) - 1_750_000_000_000 >= FIRST:
                rewrite_votes += 1
                vote["confidence"] += 1e-9
                data = json.dumps(vote, separators=(",", ":")).encode()
                return [Recorded(item.stream, item.key, item.id, {b"data": data})]
        return [item]

    changed = rewrite(file, tmp_path / "changed.qrec", change)
    assert signals == LATE - FIRST
    verdict = scene.verify(changed)
    assert not verdict.ok
    assert verdict.comparison.first.agent == "lightgbm"
    assert dict(verdict.comparison.differing)["votes:lightgbm"] == 1
    assert not verdict.comparison.differing["signals"]


def test_a_signal_that_hides_a_missed_deadline_is_found(recorded, tmp_path):
    scene, file = recorded

    def change(item):
        if isinstance(item, Recorded) and item.stream == "signals":
            data = item.fields[b"data"].replace(b'"deadline_missed"', b"null")
            return [Recorded(item.stream, item.key, item.id, {b"data": data})]
        return [item]

    verdict = scene.verify(rewrite(file, tmp_path / "changed.qrec", change))
    assert verdict.comparison.differing["signals"] >= LATE - FIRST


def test_explain_recomputes_a_signal_of_stages(recorded):
    scene, _ = recorded
    told = json.loads(scene.quartet("explain", "--last", "--json"))
    assert told["same"]
    assert {check["what"]: check["same"] for check in told["recomputed"]}["consensus"]


def test_one_namespace_is_run_one_way(recorded):
    scene, _ = recorded
    with pytest.raises(CheckFailed, match=r"was run in stages .* another --namespace"):
        serve(scene.settings(), Options(until_idle_s=0.1), make_logger("error"))
    chained = Scene(scene.url, scene.namespace + "chained", scene.models, scene.directory)
    chained.feed(market(1, 5))
    chained.work()
    with pytest.raises(CheckFailed, match=r"was run in one process .* another --namespace"):
        work(chained, "consensus")

"""kill -9 anywhere: none lost, none doubled, none different. Two instances: one writes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from streams.messages import AGENTS
from tests.chaos.kills import SYMBOLS, everything_once, frozen_is_fenced, killed_equals_calm
from tests.chaos.scene import TREES, added, assert_same, market, until
from tests.helpers import ROOT, environment

BARS = 150


def test_forty_kills_change_nothing_that_comes_out(stage, valkey):
    hits = killed_equals_calm(lambda name: stage(valkey, TREES, name), 40, seed=20)
    assert hits >= 30, "blind kills prove nothing"


def test_kills_change_nothing_with_all_four_agents(stage, valkey):
    hits = killed_equals_calm(lambda name: stage(valkey, AGENTS, name), 3, seed=21, batch=64)
    assert hits >= 2, "blind kills prove nothing"


def test_the_program_itself_is_killed_and_goes_on(stage, valkey):
    """Not forked: `python -m worker run`, with imports and all."""
    entries = market(SYMBOLS, BARS)
    calm, killed = stage(valkey, name="calm"), stage(valkey, name="killed")
    calm.feed(entries)
    calm.finish()
    killed.feed(entries)
    command = [sys.executable, "-m", "worker", "run", "--redis", valkey, "--namespace", killed.namespace]
    command += ["--models", str(killed.models), "--http-port", "0", "--state-dir", str(killed.directory)]
    env = {"QUARTET_WARMUP_BARS__V3": "30", "QUARTET_LEASE_S": "0.4", "QUARTET_BATCH_SIZE": "32"}
    env["NUMBA_CACHE_DIR"] = os.environ["NUMBA_CACHE_DIR"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(env), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not killed.progress():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    killed.finish()
    assert_same(killed.outputs(), calm.outputs())


def test_a_frozen_owner_is_replaced_and_fenced_off(stage, valkey):
    frozen, rng = stage(valkey, TREES), random.Random(22)
    for n in range(3):
        frozen_is_fenced(frozen, rng, 1_000 * n)
    frozen.finish()
    everything_once(valkey, frozen, 3 * 280)


def test_sigterm_commits_what_is_in_hand_and_lets_a_standby_in_at_once(stage, valkey):
    """The lease is long, so that only its release can explain the takeover."""
    entries = market(SYMBOLS, BARS)
    calm, handed = stage(valkey, TREES, "calm"), stage(valkey, TREES, "handed", QUARTET_LEASE_S="600")
    calm.feed(entries)
    calm.finish()
    handed.feed(entries[:300])
    first = handed.start(QUARTET_BATCH_SIZE="8")
    until(lambda: handed.progress() > 0, first)
    second = handed.start(QUARTET_BATCH_SIZE="8")
    until(lambda: "standing by" in second.text, second)
    assert first.terminate() == 0, first.text
    assert "stopping" in first.text
    handed.feed(entries[300:], 300)
    until(lambda: handed.progress() == len(entries), second)
    assert second.terminate() == 0, second.text
    assert '"clean"' in second.text
    assert_same(handed.outputs(), calm.outputs())


def test_a_standby_that_is_told_to_stop_stops(stage, valkey):
    stood = stage(valkey, TREES, QUARTET_LEASE_S="30")
    owner = stood.start()
    until(lambda: "warming up" in owner.text, owner)
    standby = stood.start()
    until(lambda: "standing by" in standby.text, standby)
    assert standby.terminate() == 0
    assert owner.terminate() == 0


def test_an_entry_that_kills_the_worker_is_left_out_after_three_deaths_alone(stage, valkey):
    """Its first death is in a batch; three in batches of one follow; the fifth life rejects it."""
    entries = market(SYMBOLS, BARS)
    deadly = {**entries[301], b"symbol": b"DEADLY"}
    calm, poisoned = stage(valkey, TREES, "calm"), stage(valkey, TREES, "poisoned")
    calm.feed(entries[:301])
    calm.feed(entries[302:], 302)
    calm.finish()
    poisoned.feed([*entries[:301], deadly, *entries[302:]])
    deaths = 0
    while (life := poisoned.start("--until-idle", "0.1", CHAOS_DEADLY_SYMBOL="DEADLY")).wait() == -signal.SIGKILL:
        deaths += 1
        assert deaths < 10, life.text
    assert deaths == 4
    assert added(valkey, poisoned.keys.rejected) == 1
    import redis

    with redis.Redis.from_url(valkey) as client:
        [(_, reject)] = client.xrange(poisoned.keys.rejected)
    assert (reject[b"reason"], reject[b"in:symbol"]) == (b"poison", b"DEADLY")
    assert_same(poisoned.outputs(), calm.outputs())


@pytest.mark.parametrize("batch", [1, 7, 64, 256])
def test_batches_of_any_size_and_restarts_between_them_give_the_same_bytes(stage, valkey, batch, reference):
    """All four agents; the restart falls between the batches of an unclean end and is cautious."""
    entries, expected = reference
    some = stage(valkey, QUARTET_BATCH_SIZE=str(batch))
    some.feed(entries[:411])
    some.finish()
    some.feed(entries[411:], 411)
    some.finish()
    assert_same(some.outputs(), expected)


@pytest.fixture(scope="module")
def reference(workers, models, valkey, tmp_path_factory):
    """An uninterrupted run of all four agents with the default batches."""
    from tests.chaos.scene import Stage

    entries = market(SYMBOLS, BARS)
    calm = Stage(workers, valkey, f"ref{os.getpid()}", models, tmp_path_factory.mktemp("reference"))
    calm.feed(entries)
    calm.finish()
    return entries, calm.outputs()

"""Stages in processes of their own give the bytes that the chained process gives."""

from __future__ import annotations

from streams.messages import AGENTS
from tests.chaos.scene import assert_same, market
from tests.stages.scene import finish

BARS = 150


def test_all_four_agents_give_the_same_bytes_in_stages(stage, valkey):
    entries = market(3, BARS)
    chained, split = stage(valkey, AGENTS, "chained"), stage(valkey, AGENTS, "split")
    for each in (chained, split):
        each.feed(entries)
    chained.finish()
    finish(split, QUARTET_BATCH_SIZE="64")
    assert_same(split.outputs(), chained.outputs())

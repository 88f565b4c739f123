"""What the tests of stages share: names, and one namespace run to its end by every stage in turn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import redis

from tests.chaos.scene import Stage as Scene

PATIENT = {"QUARTET_DEADLINE_S": "600"}
"""No agent is late: what was split equals what was chained."""


def names(agents: Sequence[str]) -> list[str]:
    """Every stage, in the order of the way of a bar."""
    return ["features", *(f"agent:{agent}" for agent in agents), "consensus"]


def finish(scene: Scene, *arguments: str, **env: str) -> dict[str, str]:
    """Run each stage to the end of its input, one after another; their logs."""
    return {name: scene.finish("--stage", name, *arguments, **{**PATIENT, **env}) for name in names(scene.agents)}


def messages(url: str, key: str) -> list[dict[str, Any]]:
    with redis.Redis.from_url(url) as client:
        return [json.loads(fields[b"data"]) for _, fields in client.xrange(key)]


def events(scene: Scene, *kinds: str) -> list[Mapping[str, Any]]:
    return [e for e in messages(scene.url, scene.keys.events) if not kinds or e["kind"] in kinds]

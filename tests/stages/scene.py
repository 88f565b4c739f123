"""What the tests of stages share: names, and one namespace run to its end by every stage in turn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import redis

from tests.chaos.scene import Stage as Scene
from tests.helpers import environment

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


def run_split(scene: Scene, log: Path, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
    """Start `quartet run --split` on the namespace; what it says goes to `log`."""
    settings = {
        "QUARTET_REDIS": scene.url,
        "QUARTET_NAMESPACE": scene.namespace,
        "QUARTET_AGENTS": ",".join(scene.agents),
        "QUARTET_QUORUM": str(len(scene.agents)),
        "QUARTET_WARMUP_BARS__V3": "30",
        "QUARTET_DEADLINE_S": "600",
        "QUARTET_HTTP_PORT": "0",
    }
    command = [sys.executable, "-m", "worker", "run", "--split", "--models", str(scene.models), *arguments]
    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=scene.directory, env=environment({**settings, **env}), stderr=out)

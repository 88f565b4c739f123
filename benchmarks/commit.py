"""What one fenced commit costs: packing here, the script on the server, the reply.

    python -m benchmarks.commit [--json] [--seconds 1.0]

Features, four votes and a signal for each bar, and the state of its series, in the sizes that the worker
writes, to an embedded server with its append-only file synced every second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.machine import line, microseconds
from streams import embedded
from streams.keys import Keys
from streams.messages import AGENTS
from streams.redis import RedisStore, connect
from streams.store import Commit, InputPosition, Output, Position

BATCHES = (1, 16, 64, 256)
BYTES = {"features": 950, "vote": 480, "signal": 960}
STATE = {"series": 90, "features": 400, "windows:v3": 240}
SYMBOLS = 50


def commits(store: RedisStore, bars: int) -> Callable[[], None]:
    """A function that makes the next commit of so many bars."""
    keys, done = store.keys, 0

    def commit() -> None:
        nonlocal done
        ids = [f"{1_750_000_000_000 + n}-0" for n in range(done, done + bars)]
        done += bars
        sizes = {keys.features: BYTES["features"], keys.signals: BYTES["signal"]}
        sizes |= {keys.votes(agent): BYTES["vote"] for agent in AGENTS}
        fields = [b"%d" % (n % SYMBOLS) for n in range(bars)]
        store.commit(
            Commit(
                Position({keys.bars: InputPosition(ids[-1], done)}, ids[-1]),
                [Output(key, ids, [b"x" * size] * bars) for key, size in sizes.items()],
                {},
                {part: [(field, b"x" * size) for field in fields] for part, size in STATE.items()},
            )
        )

    return commit


def measure(seconds: float) -> list[dict[str, float]]:
    found = []
    with tempfile.TemporaryDirectory() as name, embedded.start(Path(name)) as server:
        for bars in BATCHES:
            store = RedisStore(connect(server.url), Keys(f"b{bars}"), retain=20_000)
            store.acquire()
            us = microseconds(commits(store, bars), seconds)
            found.append({"bars": bars, "us_a_commit": us, "us_a_bar": us / bars})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each size")
    given = parser.parse_args()
    rows = measure(given.seconds)
    if given.json:
        print(json.dumps({"machine": line(), "commit": rows}))
        return
    print(f"{'bars':>6}{'us a commit':>13}{'us a bar':>10}")
    for row in rows:
        print(f"{row['bars']:>6}{row['us_a_commit']:>13.0f}{row['us_a_bar']:>10.1f}")


if __name__ == "__main__":
    main()

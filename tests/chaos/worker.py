"""`python -m tests.chaos.worker`: starts `quartet run` again and again without paying for its imports.

A warmed-up parent without threads forks; each child runs the program as `quartet run` does, with real
stores, pipelines and models. One JSON object a line: in `{"do": "start", "arguments", "env", "log"}`
or `{"do": "wait", "pid"}`, out the process id or the exit code (a signal is negative).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

DEADLY = "CHAOS_DEADLY_SYMBOL"
"""A bar of this symbol kills the worker: read here only, the product does not know it."""
STALLED = "CHAOS_STALLED_S"
"""How long a worker on Kafka may stand still, in seconds, instead of a minute."""
SESSION = "CHAOS_SESSION_S"
"""After how long a silent worker's partitions of a Kafka group go to others, in seconds, instead of twelve."""
LEADER_WAITS = "CHAOS_LEADER_WAITS_S"
"""How long the leader of a Kafka group thinks about who gets what. librdkafka's mock cluster needs that: it refuses a
member that asks for its share after the leader has told it."""


def warm_up() -> None:
    """Import what a worker needs and compile its kernels; nothing here starts a thread."""
    import lightgbm  # noqa: F401
    import xgboost  # noqa: F401

    import worker.assembly
    import worker.cli.run
    from worker.features.bank import FeatureBank
    from worker.features.windows import SequenceWindows

    worker.assembly.use_one_thread_a_model()
    FeatureBank()
    SequenceWindows(23)


def child(arguments: list[str], env: dict[str, str], log: str) -> None:
    """Become `quartet run ARGUMENTS` and end with its exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(env)
    if env.get(DEADLY):
        die_on(env[DEADLY])
    if env.get(STALLED):
        from worker.kafka import watchdog

        watchdog.STALLED_S = float(env[STALLED])
    if env.get(SESSION):
        from worker.kafka import application

        application.SESSION_S, application.HEARTBEAT_S = float(env[SESSION]), float(env[SESSION]) / 8
    if env.get(LEADER_WAITS):
        wait_before_assigning(float(env[LEADER_WAITS]))
    from worker.cli.app import invoke

    os._exit(invoke(["run", *arguments]))


def die_on(symbol: str) -> None:
    """Make a bar of `symbol` end the process as a crash inside a library would."""
    from worker.intake import Intake

    accept_one = Intake._accept_one

    def deadly(self: Any, batch: Any, entry: Any, raw: Any, *rest: Any, **further: Any) -> None:
        if raw.get("symbol") == symbol:
            os.kill(os.getpid(), signal.SIGKILL)
        accept_one(self, batch, entry, raw, *rest, **further)

    Intake._accept_one = deadly  # type: ignore[method-assign]


def wait_before_assigning(seconds: float) -> None:
    """Slow the leader of a group down."""
    import time

    from faust.assignor.partition_assignor import PartitionAssignor

    assign = PartitionAssignor.assign

    def slow(self: Any, cluster: Any, members: Any) -> Any:
        time.sleep(seconds * (len(members) > 1))
        return assign(self, cluster, members)

    PartitionAssignor.assign = slow


def start(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child(order["arguments"], order["env"], order["log"])
        except BaseException:  # noqa: BLE001 - a fork must end here, with the reason in its log
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(99)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    warm_up()
    print("ready", flush=True)
    alive: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            alive.add(pid := start(order))
            print(pid, flush=True)
        else:
            print(wait(order["pid"]), flush=True)
            alive.discard(order["pid"])
    for pid in alive:  # of a test that failed before it ended them
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()

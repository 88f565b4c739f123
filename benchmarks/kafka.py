"""The Kafka engine: bars a second with 1 and 2 workers, bytes on the topics, CPU by part, memory, recovery.

    python -m benchmarks.kafka [--json] [--agents trees|all] [--minutes 200] [--symbols 600]

Real worker processes (`quartet run --broker`) on librdkafka's mock cluster, which is a process of its own and takes
its share of the same cores. A worker is held on one core where that is said, so that one and two of them compare.
Every symbol is past its warm-up and has its whole windows: each measured bar gets its votes and a signal. Partitions
hold equally many symbols. `docs/scaling.md` works with these figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, TopicPartition
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.machine import demo_models, line
from streams.messages import AGENTS
from streams.topics import partition_of
from tests.helpers import environment, free_port
from tests.kafka.cluster import Cluster, mock_cluster, produce, read_records
from worker.training.market import generate

TREES = ("xgboost", "lightgbm")
PARTITIONS = 12
SYMBOLS = 48
STATE_PARTITIONS = 24
"""The mock cluster keeps 5 MB of a partition: the state of 20 symbols and what the ledger keeps beside it."""
CHANGELOG = "quartet-state-changelog"
WARM_UP = 30
WARM_MINUTES = WARM_UP + 64
LIMIT_S = 600.0
TICKS = os.sysconf("SC_CLK_TCK")

Bar = dict[str, Any]


@dataclass
class Worker:
    """One process of the group."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def samples(self) -> dict[str, float]:
        """The value of every sample of `/metrics`, by name and label values."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {" ".join((s.name, *s.labels.values())): s.value for family in families for s in family.samples}

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(row) for row in self.log.read_text().splitlines() if row.startswith("{")]

    def last(self, event: str) -> float:
        """When an event was logged last, Unix time."""
        return max(datetime.fromisoformat(row["ts"]).timestamp() for row in self.lines() if row["event"] == event)

    def partitions(self) -> int:
        """How many it has, as it said last."""
        told = [row["event"] for row in self.lines() if row["event"].startswith("partitions taken over")]
        return len(told[-1].partition(":")[2].split(",")) if told else 0

    @property
    def cpu_s(self) -> float:
        return cpu_of(self.process.pid)

    @property
    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@dataclass
class Group:
    """Workers of one namespace of a cluster of its own."""

    cluster: Cluster
    agents: Sequence[str]
    directory: Path
    partitions: int = PARTITIONS
    started: int = 0

    def __post_init__(self) -> None:
        self.topics = self.cluster.create("quartet", self.partitions, more=[CHANGELOG])

    @property
    def broker_pid(self) -> int:
        assert self.cluster.process is not None
        return self.cluster.process.pid

    @contextmanager
    def worker(self, cores: Sequence[int]) -> Iterator[Worker]:
        """Start one, on some of the cores; it is killed at the end of the block."""
        self.started += 1
        port, log = free_port(), self.directory / f"{self.started}.log"
        command = [sys.executable, "-m", "worker", "run", "--broker", self.cluster.url, "--http-port", str(port)]
        command += ["--models", str(demo_models()), "--state-dir", str(self.directory)]
        env = {"QUARTET_AGENTS": ",".join(self.agents), "QUARTET_QUORUM": str(min(3, len(self.agents)))}
        env |= {"QUARTET_WARMUP_BARS__V3": str(WARM_UP), "QUARTET_WATCH_S": "0"}
        env |= {"NUMBA_CACHE_DIR": str(Path(".quartet/numba").resolve())}
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=environment(env), stderr=out)
        os.sched_setaffinity(process.pid, cores)  # before it starts a thread
        try:
            yield Worker(process, port, log)
        finally:
            process.kill()
            process.wait()

    def send(self, bars: Sequence[Bar]) -> None:
        produce(self.cluster, self.topics.bars, bars, self.partitions, pack=256)


def until(condition: Any, workers: Sequence[Worker]) -> None:
    """Wait, and look ten times a second."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        for worker in workers:
            if worker.process.poll() is not None:
                raise RuntimeError(worker.log.read_text()[-3000:])
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {LIMIT_S:g} s: {workers[0].log.read_text()[-3000:]}")
        time.sleep(0.1)


def total(workers: Sequence[Worker], name: str) -> float:
    return sum(v for worker in workers for sample, v in worker.samples().items() if sample.split(" ")[0] == name)


def symbols_of(partitions: int, each: int) -> list[str]:
    """Names of which `each` fall into every partition."""
    found: dict[int, list[str]] = defaultdict(list)
    number = 0
    while len(found) < partitions or min(map(len, found.values())) < each:
        name = f"S{number}"
        found[partition_of(name, partitions)].append(name)
        number += 1
    return [name for names in found.values() for name in names[:each]]


def market(symbols: Sequence[str], minutes: int) -> list[Bar]:
    """Bars of a generated market under given names, minute by minute."""
    made = generate(len(symbols), minutes, 0, signal="planted")
    return [
        {"symbol": name, "ts": ts, "interval": "1m"}
        | dict(zip(("open", "high", "low", "close", "volume"), row, strict=True))
        for ts, rows in zip(made.ts.tolist(), made.ohlcv.tolist(), strict=True)
        for name, row in zip(symbols, rows, strict=True)
    ]


def consumed(group: Group, running: Sequence[Worker], bars: Sequence[Bar], so_far: int) -> float:
    """Send bars and wait until each has come out; seconds. `so_far` came out before them."""
    began = time.perf_counter()
    group.send(bars)
    until(lambda: total(running, "quartet_bars_total") == so_far + len(bars), running)
    return time.perf_counter() - began


# ---------------------------------------------------------------------- throughput


@dataclass(frozen=True)
class Plan:
    """One run: `cores[n]` are those of worker n."""

    agents: Sequence[str]
    cores: Sequence[Sequence[int]]
    partitions: int = PARTITIONS


def throughput(plan: Plan, minutes: int) -> dict[str, Any]:
    """Bars a second from the first byte sent to the last bar committed, where the CPU went, and bytes by topic."""
    symbols = symbols_of(plan.partitions, SYMBOLS // plan.partitions)
    bars = market(symbols, WARM_MINUTES + minutes)
    split, n = WARM_MINUTES * len(symbols), minutes * len(symbols)
    with tempfile.TemporaryDirectory() as name, mock_cluster() as cluster, ExitStack() as stack:
        group = Group(cluster, plan.agents, Path(name), plan.partitions)
        running: list[Worker] = []
        for cores in plan.cores:  # one joins the group after the other
            running.append(stack.enter_context(group.worker(cores)))
            until(lambda: running[-1].partitions() > 0, running)
        until(lambda: {w.partitions() for w in running} == {plan.partitions // len(running)}, running)
        consumed(group, running, bars[:split], 0)
        before, broker = counted(running), cpu_of(group.broker_pid)
        seconds = consumed(group, running, bars[split:], split)
        after = counted(running)
        broker = cpu_of(group.broker_pid) - broker
        votes = after["quartet_signals_total"] - before["quartet_signals_total"]
        assert votes == n, f"{votes} signals of {n} bars"
        spent = {key: (after[key] - before[key]) / n * 1e6 for key in after}
        return {
            "agents": len(plan.agents),
            "workers": len(plan.cores),
            "cores": len({core for some in plan.cores for core in some}),
            "partitions": plan.partitions,
            "bars_per_second": n / seconds,
            "bars_a_commit": n / (after["quartet_commits_total ok"] - before["quartet_commits_total ok"]),
            "worker_cpu_us": spent["cpu"],
            "broker_cpu_us": broker / n * 1e6,
            "stages_us": {k.split(" ")[1]: v for k, v in spent.items() if k.startswith("quartet_stage_seconds_sum ")},
            "bytes_a_bar": bytes_of(group, len(bars)),
        }


def counted(running: Sequence[Worker]) -> Counter[str]:
    """Samples and CPU seconds, added over the workers; signals over their labels too."""
    found = Counter[str]()
    for worker in running:
        found.update(worker.samples())
        found["cpu"] += worker.cpu_s  # type: ignore[assignment]
    found["quartet_signals_total"] = sum(v for k, v in found.items() if k.startswith("quartet_signals_total "))
    return found


def bytes_of(group: Group, bars: int) -> dict[str, float]:
    """Bytes of record values for each bar: the mean size of what a topic still holds, times what was ever sent."""
    found = {}
    for topic in (*group.topics.all(group.agents), CHANGELOG):
        kept = read_records(group.cluster, topic)
        sizes = [len(value or b"") for values in kept for value in values]
        if sizes:
            found[topic.removeprefix("quartet.")] = sum(sizes) / len(sizes) * ever_sent(group.cluster, topic) / bars
    return found


def ever_sent(cluster: Cluster, topic: str) -> int:
    """Records that were ever written to a topic."""
    reader = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "count"})
    try:
        partitions = reader.list_topics(topic, 60).topics[topic].partitions
        return sum(reader.get_watermark_offsets(TopicPartition(topic, p), 60)[1] for p in partitions)
    finally:
        reader.close()


# ---------------------------------------------------------------------- state


@dataclass(frozen=True)
class Life:
    """One worker from its start over its takeover to its end."""

    takeover_s: float
    cpu_s: float
    taken_mib: float
    full_mib: float


def state(agents: Sequence[str], symbols: int, partitions: int) -> dict[str, Any]:
    """What 1,000 symbols cost a worker in memory and in time to take them over: the difference of two sizes."""
    names = symbols_of(partitions, symbols // partitions)
    half = len(names) // 2
    bars = market(names, WARM_MINUTES + 1)
    first, last = set(names[::2]), bars[-len(names) :]
    portions = [[b for b in bars[: -len(names)] if (b["symbol"] in first) is wanted] for wanted in (True, False)]
    with tempfile.TemporaryDirectory() as name, mock_cluster() as cluster:
        group = Group(cluster, agents, Path(name), partitions)
        new, taken_half, taken_all = [one_life(group, portion) for portion in (*portions, last)]
    return {
        "agents": len(agents),
        "symbols": len(names),
        "partitions": partitions,
        "mib_without_symbols": new.taken_mib,
        "mib_after_the_first_half": new.full_mib,
        "mib_after_takeover_of_half": taken_half.taken_mib,
        "mib_after_takeover_of_all": taken_all.taken_mib,
        "takeover_of_half_s": taken_half.takeover_s,
        "takeover_of_all_s": taken_all.takeover_s,
        "mib_per_1000_symbols": (taken_all.taken_mib - taken_half.taken_mib) / half * 1000,
        "cpu_s_per_1000_symbols": (taken_all.cpu_s - taken_half.cpu_s) / half * 1000,
    }


def one_life(group: Group, bars: Sequence[Bar]) -> Life:
    """Take over what there is, work through `bars`, end by SIGTERM."""
    with group.worker((0, 1)) as worker:
        until(lambda: worker.partitions() == group.partitions, [worker])
        known = group.started > 1
        until(lambda: not known or worker.samples()["quartet_recoveries_total"] == group.partitions, [worker])
        cpu, taken, seconds = worker.cpu_s, worker.resident_mib, time.time() - worker.last("agent loaded")
        consumed(group, [worker], bars, 0)
        # Every agent, in the worst of the partitions: no window is missing.
        until(lambda: worker.samples()["quartet_ensemble_agents voting"] == len(group.agents), [worker])
        full = worker.resident_mib
        worker.process.send_signal(signal.SIGTERM)
        code = worker.process.wait(LIMIT_S)
        assert code == 0, worker.log.read_text()[-3000:]
    return Life(seconds, cpu, taken, full)


# ---------------------------------------------------------------------- all of it


def plans(agents: Sequence[str]) -> list[Plan]:
    return [Plan(agents, [(0,)]), Plan(agents, [(0, 1)]), Plan(agents, [(0,), (1,)]), Plan(agents, [(0,)], 1)]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    print(" agents workers cores partitions   bars/s a commit  us of CPU a bar: worker broker")
    for row in rows:
        print(
            f"{row['agents']:>7}{row['workers']:>8}{row['cores']:>6}{row['partitions']:>11}{row['bars_per_second']:>9,.0f}"
            f"{row['bars_a_commit']:>9.0f}{row['worker_cpu_us']:>25.0f}{row['broker_cpu_us']:>7.1f}"
        )
    for row in (row for row in rows if row["partitions"] == 1):
        stages = {name: us for name, us in row["stages_us"].items() if name not in ("read", "commit")}
        stages["rest"] = row["worker_cpu_us"] - sum(stages.values())
        print(f"{row['agents']} agents, us a bar: " + " ".join(f"{name} {us:.1f}" for name, us in stages.items()))
        print("  bytes a bar: " + " ".join(f"{topic} {size:.0f}" for topic, size in row["bytes_a_bar"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--minutes", type=int, default=400, help="measured bars of each of 48 symbols")
    parser.add_argument("--symbols", type=int, default=480, help="symbols of the runs for memory and recovery")
    given = parser.parse_args()
    rows, states = [], []
    for agents in (TREES, AGENTS):
        rows += [throughput(plan, given.minutes) for plan in plans(agents)]
        states.append(state(agents, given.symbols, STATE_PARTITIONS))
    if given.json:
        print(json.dumps({"machine": line(), "kafka": rows, "state": states}))
        return
    show(rows)
    for one in states:
        print(" ".join(f"{name} {value:,.1f}" for name, value in one.items()))


if __name__ == "__main__":
    main()

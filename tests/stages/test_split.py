"""`quartet run --split`: the supervisor, with programs that do nothing and with the real stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import redis
import structlog

from tests.chaos.scene import TREES, added, assert_same, market
from tests.helpers import ROOT, environment, quartet, wait_for
from tests.stages.scene import run_split
from worker.assembly import stage_names
from worker.errors import CheckFailed, UsageError
from worker.settings import Settings
from worker.split import PAUSES_S, Stage, Supervisor, ports

LOG = structlog.get_logger()
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
SERVE = [
    sys.executable,
    "-c",
    "import time; from worker.notify import Notifier; Notifier.from_environment().ready('serving'); time.sleep(600)",
]
STAND_BY = [
    sys.executable,
    "-c",
    "import time; from worker.notify import *; Notifier.from_environment().status(STANDING_BY); time.sleep(600)",
]


@pytest.fixture
def supervised(tmp_path):
    """Make a supervisor of commands."""

    def make(*commands: list[str], idle=lambda: False) -> Supervisor:
        stages = [Stage(f"s{n}", c, environment(), tmp_path / f"s{n}") for n, c in enumerate(commands)]
        return Supervisor(stages, LOG, threading.Event(), idle=idle)

    return make


def run_aside(supervisor: Supervisor) -> threading.Thread:
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    return thread


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_the_stages_follow_the_bars_and_the_consensus_has_the_port():
    names = stage_names(Settings(agents=("xgboost", "nhits"), quorum=2))
    assert names == ("features", "agent:xgboost", "agent:nhits", "consensus")
    assert ports(names, 9464) == {"consensus": 9464, "features": 9465, "agent:xgboost": 9466, "agent:nhits": 9467}
    assert set(ports(names, 0).values()) == {0}


@pytest.mark.parametrize("settled", [SERVE, STAND_BY])
def test_the_last_stage_starts_once_the_others_serve_or_stand_by(supervised, settled):
    supervisor = supervised(SLEEP, settled, SERVE)
    thread = run_aside(supervisor)
    first, second, last = supervisor.stages
    wait_for(lambda: second.ready or second.waits)
    assert (second.ready, second.waits) == (settled is SERVE, settled is STAND_BY)
    assert last.lives == 0, "the first has not said that it serves"
    first.command = SERVE
    os.kill(first.process.pid, signal.SIGKILL)
    wait_for(lambda: last.ready)
    assert (first.lives, last.lives) == (2, 1)
    supervisor.stop.set()
    thread.join()


def test_flags_of_the_first_life_are_not_given_to_the_next(supervised, tmp_path):
    told = tmp_path / "told"
    program = f"import sys; open({str(told)!r}, 'a').write(' '.join(sys.argv[1:]) + ';')"
    supervisor = supervised([sys.executable, "-c", f"{program}; raise SystemExit(75)"], SLEEP)
    supervisor.stages[0].once = ["--accept-gap"]
    thread = run_aside(supervisor)
    wait_for(lambda: told.exists() and told.read_text().count(";") >= 2)
    supervisor.stop.set()
    thread.join()
    assert told.read_text().split(";")[:2] == ["--accept-gap", ""]


def test_a_stage_that_is_killed_lives_again_and_the_others_live_on(supervised):
    supervisor = supervised(SERVE, SERVE)
    thread = run_aside(supervisor)
    first, second = supervisor.stages
    wait_for(lambda: all(stage.process is not None and stage.code is None for stage in supervisor.stages))
    other, pid = second.process.pid, first.process.pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: first.process is not None and first.process.pid != pid and first.lives == 2)
    assert second.process.pid == other
    pids = [stage.process.pid for stage in supervisor.stages]
    supervisor.stop.set()
    thread.join()
    assert not any(alive(pid) for pid in pids)


def test_a_stage_that_dies_again_and_again_ends_them_all(supervised, tmp_path, monkeypatch):
    monkeypatch.setattr("worker.split.PAUSES_S", (0.0,) * len(PAUSES_S))
    born = tmp_path / "born"
    program = f"import os; open({str(born)!r}, 'a').write('.'); os.kill(os.getpid(), 9)"
    supervisor = supervised(SLEEP, [sys.executable, "-c", program], SLEEP)
    with pytest.raises(CheckFailed, match="s1 died 5 times in a row, the last time with exit code -9"):
        supervisor.run()
    assert born.read_text() == "." * len(PAUSES_S)
    assert not alive(supervisor.stages[0].process.pid)


@pytest.mark.parametrize(("code", "error"), [(1, CheckFailed), (2, UsageError)])
def test_a_stage_that_cannot_start_ends_them_all_with_its_exit_code(supervised, code, error):
    supervisor = supervised(SLEEP, [sys.executable, "-c", f"raise SystemExit({code})"], SLEEP)
    with pytest.raises(error, match=f"s1 ended with exit code {code}") as caught:
        supervisor.run()
    assert caught.value.exit_code == code
    assert not alive(supervisor.stages[0].process.pid)


def test_it_ends_by_itself_where_there_is_nothing_left_to_do(supervised):
    looks = iter([False, False, True])
    supervisor = supervised(SERVE, SERVE, idle=lambda: next(looks))
    supervisor.run()
    assert not any(alive(pid) for pid in (stage.process.pid for stage in supervisor.stages))


@pytest.mark.skipif(sys.platform != "linux", reason="only the kernel of Linux tells a child of its parent's end")
def test_a_supervisor_that_is_killed_leaves_no_stage_behind(tmp_path):
    program = (
        "import os, structlog, sys, threading, worker.split as s\n"
        "from pathlib import Path\n"
        f"stage, other = (s.Stage(n, {SERVE!r}, dict(os.environ), Path(sys.argv[1] + n)) for n in 'ab')\n"
        "log = structlog.get_logger()\n"
        "class Told(s.Supervisor):\n"
        "    def _start(self, stage):\n"
        "        super()._start(stage)\n"
        "        open(sys.argv[1] + '.new', 'w').write(str(stage.process.pid))\n"
        "        os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "Told([stage, other], log, threading.Event()).run()\n"
    )
    told = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", program, str(told)], cwd=ROOT, env=environment()) as supervisor:
        wait_for(told.exists)
        supervisor.kill()
    wait_for(lambda: not alive(int(told.read_text())))


# ---------------------------------------------------------------------- the real stages


@pytest.fixture
def scenes(stage, valkey):
    """The same bars twice: worked off in one process, and waiting for stages."""
    chained, split = stage(valkey, TREES, "chained"), stage(valkey, TREES, "split")
    entries = market(4, 150)
    chained.feed(entries)
    chained.finish()
    split.feed(entries)
    return chained, split


def started(log: Path) -> dict[str, int]:
    """The process of each stage that was started, the last one of each."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return {line["stage"]: line["pid"] for line in lines if line["event"].endswith(" started")}


def test_split_gives_what_one_process_gives_also_where_stages_are_killed(scenes, tmp_path):
    chained, split = scenes
    log = tmp_path / "split.log"
    with run_split(split, log, "--until-idle", "1", QUARTET_BATCH_SIZE="4") as program:
        wait_for(lambda: added(split.url, split.keys.signals) > 0 or program.poll() is not None)
        pids = started(log)
        assert pids.keys() == {"features", *(f"agent:{agent}" for agent in TREES), "consensus"}, log.read_text()
        for name in ("agent:lightgbm", "consensus", "features"):
            os.kill(pids[name], signal.SIGKILL)
        code = program.wait(300)
    assert code == 0, log.read_text()
    assert log.read_text().count("ended; starting it again") == 3
    assert '"all stages serve"' in log.read_text()
    assert_same(split.outputs(), chained.outputs())
    assert not any(alive(pid) for pid in started(log).values())


def test_sigterm_ends_all_stages_cleanly_and_nothing_is_left(scenes, tmp_path):
    _, split = scenes
    log = tmp_path / "split.log"
    with run_split(split, log) as program:
        wait_for(lambda: "all stages serve" in log.read_text() or program.poll() is not None)
        program.terminate()
        assert program.wait(120) == 0, log.read_text()
    assert not any(alive(pid) for pid in started(log).values())
    with redis.Redis.from_url(split.url) as client:
        owners = [client.hget(split.keys.owner(name), "clean") for name in started(log)]
    assert set(owners) == {b"1"}


def test_a_namespace_of_one_process_and_a_folder_without_models_are_refused_with_exit_code_1(scenes, tmp_path):
    chained, split = scenes
    log = tmp_path / "split.log"
    with run_split(chained, log) as program:
        assert program.wait(120) == 1
    assert log.read_text().startswith("error: namespace ")
    with run_split(split, log, "--models", str(tmp_path)) as program:
        assert program.wait(120) == 1
    assert "no agent can vote" in log.read_text()
    assert log.read_text().splitlines()[-1] == "error: stage features ended with exit code 1; its line says why"


@pytest.mark.parametrize("other", [("--stage", "features"), ("--rebuild",)])
def test_flags_that_do_not_go_together_are_wrong_usage(tmp_path, other):
    done = quartet("run", "--split", *other, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --")
    assert done.stderr.count("\n") == 1

"""`quartet run --split`: every stage as a process of its own on this machine, started, watched and stopped together.

The consensus comes last: an agent that is still loading its model is not late. A stage that dies is started again.
One that fails before all of them served, or dies again and again, ends them all: what it said on stderr is the reason.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import redis
from structlog.typing import FilteringBoundLogger

from streams.inputs import Inputs
from streams.keys import CONSENSUS, FEATURES, Keys
from streams.redis import RedisStore
from streams.store import InputPosition, StoreUnavailableError
from worker.assembly import check_way, open_client, server_url, stage_names
from worker.errors import CHECK_FAILED, UNAVAILABLE, USAGE, CheckFailed, QuartetError, Unavailable, UsageError
from worker.notify import STANDING_BY, Notifier
from worker.service import Options
from worker.settings import Settings

POLL_S = 0.1
LOOK_S = 0.5
"""Seconds between two looks at how far the stages are."""

PAUSES_S = (0.0, 0.5, 1.0, 2.0, 5.0)
"""What passes before each new life of a stage; it has no more lives than these within `SHORT_S` each."""

SHORT_S = 30.0
"""A life that was longer than this starts the count of pauses anew."""

PATIENCE_S = 25.0
"""How long a stage may take to commit its batch in hand once it was told to stop; service managers give 30."""

STANDS_BY = b"STATUS=" + STANDING_BY.encode()
PR_SET_PDEATHSIG = 1

_FAILURES: Mapping[int, type[QuartetError]] = {CHECK_FAILED: CheckFailed, USAGE: UsageError, UNAVAILABLE: Unavailable}


def ports(stages: Sequence[str], first: int) -> dict[str, int]:
    """Each stage's port of metrics and health: `first` is the consensus's, the others follow; 0 is any free one."""
    ordered = [stages[-1], *stages[:-1]]
    return {stage: first + place if first else 0 for place, stage in enumerate(ordered)}


def command_of(stage: str, settings: Settings, port: int) -> list[str]:
    """The command line of one stage; settings that have no flag reach it by the environment and the file."""
    told = {"--namespace": settings.namespace, "--http-port": port}
    told |= {"--models": settings.models, "--state-dir": settings.state_dir}
    shared = [str(part) for pair in told.items() for part in pair]
    bars = [part for key in settings.bars for part in ("--bars", key)]
    return [sys.executable, "-m", "worker", "run", "--stage", stage, *shared, *bars]


def environment_of(url: str) -> dict[str, str]:
    """The environment of every stage. The server's URL stands here: a command line shows its password to everybody.

    What a service manager asks of this process is not theirs.
    """
    ours = ("WATCHDOG_USEC", "WATCHDOG_PID", "QUARTET_REDIS_FILE")
    return {name: value for name, value in os.environ.items() if name not in ours} | {"QUARTET_REDIS": url}


def _end_with_parent() -> None:
    """Have the kernel stop a stage whose supervisor was killed, so that nothing of it is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@dataclass
class Stage:
    """One stage and the process that runs it, if one does.

    `once` are flags for its first life alone. `ready` and `waits` say whether this life serves, or stands by for
    another instance: it tells so on `line`, a Unix socket, as it would tell a service manager.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    line: Path
    once: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    waits: bool = False
    lives: int = 0
    deaths: int = 0
    born: float = 0.0
    due: float = 0.0
    _told: socket.socket | None = None

    def listen(self) -> None:
        """Take in what the process told of itself since the last call."""
        while self._told is not None:
            try:
                told = self._told.recv(4096).split(b"\n")
            except BlockingIOError:
                return
            self.ready |= b"READY=1" in told
            self.waits = not self.ready and (self.waits or STANDS_BY in told)

    def start(self) -> None:
        """Begin a life."""
        self.ready = self.waits = False
        if self._told is None:
            self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._told.bind(str(self.line))
            self._told.setblocking(False)
        self.process = subprocess.Popen(
            [*self.command, *(() if self.lives else self.once)],
            stdin=subprocess.DEVNULL,
            env={**self.environment, "NOTIFY_SOCKET": str(self.line)},
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - the supervisor has one thread
        )
        self.lives += 1
        self.born = time.monotonic()

    @property
    def code(self) -> int | None:
        """How the last life ended; None while it lasts, or before the first."""
        return None if self.process is None else self.process.poll()

    def bury(self, now: float) -> float | None:
        """Note a death: the seconds until the next life, None where there were too many short ones."""
        self.listen()
        self.process, self.ready, self.waits = None, False, False
        self.deaths = 0 if now - self.born > SHORT_S else self.deaths + 1
        if self.deaths >= len(PAUSES_S):
            return None
        self.due = now + PAUSES_S[self.deaths]
        return PAUSES_S[self.deaths]


@dataclass
class Supervisor:
    """Runs `stages` until `stop` is set or `idle` says that there is nothing left to do.

    The last of them starts once the others serve, or all stand by. `idle` is asked every `LOOK_S` seconds while
    every stage serves.
    """

    stages: Sequence[Stage]
    log: FilteringBoundLogger
    stop: Event
    idle: Callable[[], bool] = lambda: False
    notifier: Notifier = field(default_factory=Notifier)
    reload: Event = field(default_factory=Event)
    _served: bool = False
    _looked: float = 0.0

    def run(self) -> None:
        """Serve. Raises the `QuartetError` that a stage's end amounts to, after all have stopped."""
        try:
            self.stages[-1].due = float("inf")
            while not self.stop.wait(POLL_S) and not self._finished():
                for stage in self.stages:
                    stage.listen()
                    self._mind(stage)
                self._look_for_all()
                if self.reload.is_set():
                    self._reload()
                self.notifier.alive()
        finally:
            self.notifier.stopping()
            self._end()

    def _start(self, stage: Stage) -> None:
        stage.start()
        assert stage.process is not None  # noqa: S101 - it was just started
        line = f"stage {stage.name} started"
        self.log.info(line, stage=stage.name, pid=stage.process.pid, life=stage.lives)

    def _mind(self, stage: Stage) -> None:
        now = time.monotonic()
        if stage.process is None:
            if now >= stage.due:
                self._start(stage)
            return
        code = stage.code
        if code is None:
            return
        if code == USAGE or (code in _FAILURES and not self._served):
            raise _FAILURES.get(code, CheckFailed)(f"stage {stage.name} ended with exit code {code}; its line says why")
        pause = stage.bury(now)
        if pause is None:
            raise CheckFailed(
                f"stage {stage.name} died {stage.deaths} times in a row, the last time with exit code {code}: "
                f"see its lines above, or run it alone with `quartet run --stage {stage.name}`"
            )
        line = f"stage {stage.name} ended; starting it again"
        self.log.error(line, stage=stage.name, reason=str(code), pause_s=pause)

    def _look_for_all(self) -> None:
        """Start the last stage when its time has come; tell once that all of them serve."""
        *others, last = self.stages
        if last.lives == 0 and all(stage.ready or stage.waits for stage in others):
            last.due = 0.0
        if not self._served and all(stage.ready for stage in self.stages):
            self._served = True
            self.log.info("all stages serve", n=len(self.stages))
            self.notifier.ready(f"{len(self.stages)} stages serve")

    def _finished(self) -> bool:
        """Whether the stages have nothing left to do."""
        now = time.monotonic()
        if now - self._looked < LOOK_S or not all(stage.ready for stage in self.stages):
            return False
        self._looked = now
        try:
            return self.idle()
        except (redis.ConnectionError, redis.TimeoutError, StoreUnavailableError):
            return False  # the stages meet the same outage and say so

    def _end(self) -> None:
        """Stop every stage; each commits its batch in hand."""
        alive = [stage.process for stage in self.stages if stage.process is not None and stage.code is None]
        for process in alive:
            process.terminate()
        deadline = time.monotonic() + PATIENCE_S
        for process in alive:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.log.exception("a stage does not stop; killed", pid=process.pid)
                process.kill()
                process.wait()

    def _reload(self) -> None:
        """Pass SIGHUP on: the agents read their newest artifacts."""
        self.reload.clear()
        for stage in self.stages:
            if stage.process is not None and stage.code is None:
                stage.process.send_signal(signal.SIGHUP)


class Progress:
    """How far the stages of a namespace are, asked of the server."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._client = client
        self._keys = Keys(settings.namespace)
        self._inputs = Inputs(settings.input_keys, settings.namespace)
        self._reads = {stage: self._reads_of(stage, settings.agents) for stage in stage_names(settings)}
        self._seen: object = None
        self._since = time.monotonic()

    def _reads_of(self, stage: str, agents: Sequence[str]) -> list[str]:
        if stage == FEATURES:
            return []
        votes = [self._keys.votes(agent) for agent in agents] if stage == CONSENSUS else []
        return [self._keys.features, *votes]

    def quiet_s(self) -> float:
        """For how long nothing has moved while every stage had read all that there was; 0 while one has not."""
        behind, seen = False, []
        for stage, reads in self._reads.items():
            store = RedisStore(self._client, self._keys, stage)
            if not reads:
                self._inputs.refresh(store.find)
            position = store.load(()).position
            facts = {key: self._facts(key) for key in reads or self._inputs.keys}
            behind |= any(_is_behind(position.inputs.get(key), *fact) for key, fact in facts.items())
            seen.append((stage, position, facts))
        if behind or seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return 0.0 if behind else time.monotonic() - self._since

    def _facts(self, key: str) -> tuple[int, int]:
        """Entries in a stream, and ever added to it; of one that is not there none."""
        try:
            info = self._client.xinfo_stream(key)
        except redis.ResponseError as error:
            if "no such key" in str(error):
                return 0, 0
            raise
        return int(info["length"]), int(info["entries-added"])


def _is_behind(position: InputPosition | None, length: int, added: int) -> bool:
    return length > 0 if position is None else position.consumed < added


def compile_once(environment: Mapping[str, str], log: FilteringBoundLogger) -> None:
    """Compile the kernels where they are not in the cache yet: stages that start together would each do it."""
    cache = Path(environment["NUMBA_CACHE_DIR"])
    if cache.is_dir() and any(cache.iterdir()):
        return
    log.info("compiling the kernels, once", cache=str(cache))
    program = "from worker.pipeline import Pipeline; Pipeline([]).voting.close()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    if done.returncode:
        raise CheckFailed(f"the kernels cannot be compiled into {cache}, see above: is it writable, and has it room?")


def serve_split(settings: Settings, options: Options, log: FilteringBoundLogger) -> None:
    """`quartet run --split`: all stages of the settings until told to stop, or idle."""
    with server_url(settings, start=True) as url, TemporaryDirectory(prefix="quartet-") as folder:
        client = open_client(url)
        check_way(client, Keys(settings.namespace), FEATURES)
        progress = Progress(client, settings)
        names = stage_names(settings)
        at = ports(names, settings.http_port)
        own = environment_of(url)
        compile_once(own, log)
        once = ["--accept-gap"] if options.accept_gap else []
        stages = [Stage(x, command_of(x, settings, at[x]), own, Path(folder, x), once) for x in names]
        limit_s = options.until_idle_s
        Supervisor(
            stages,
            log,
            options.stop,
            idle=lambda: limit_s is not None and progress.quiet_s() >= limit_s,
            notifier=Notifier.from_environment(),
            reload=options.reload,
        ).run()

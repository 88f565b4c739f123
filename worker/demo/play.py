"""The demonstration from start to end: models, server, worker, feed, and what is seen of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import redis
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from agents.discovery import discover
from streams import embedded
from streams.keys import Keys
from streams.messages import AGENTS
from worker.demo import show
from worker.demo.children import Child, ChildFailed, child, tail
from worker.demo.follow import Observer, View, entries, tally, wait_until
from worker.demo.publisher import KEPT_ENTRIES, last_shown_ts
from worker.demo.sabotage import COLLAPSING, Sabotage, prepare
from worker.demo.scene import Scene
from worker.demo.story import tell
from worker.errors import CheckFailed, Unavailable

START_LIMIT_S = 120.0
"""Imports, compiled kernels and four models, on a machine that has other work."""
IDLE_S = 120
"""A worker whose demonstration was killed ends by itself after that long."""
STALL_S = 60.0
"""No bar answered for so long means that something is broken, and waiting on would hide it."""
SWAP_LIMIT_S = 60.0
SABOTAGE_WATCH_S = 0.5
"""How often the worker of a sabotaged run looks at its models folder: a demonstration does not like to wait."""
REFRESH_S = 0.2
LINE_EVERY_S = 3.0


@dataclass(frozen=True)
class Stage:
    """What every part of the demonstration needs: the scene, the keys, and where to speak."""

    scene: Scene
    keys: Keys
    console: Console

    def say(self, text: str, *, wrap: bool = True) -> None:
        """One line, wrapped at words on a terminal unless `wrap` is false, never in a pipe."""
        whole = not (wrap and self.console.is_terminal)
        self.console.print(text, markup=False, highlight=False, soft_wrap=whole)


def play(stage: Stage, port: int, *, after: Callable[[show.Outcome], None]) -> show.Outcome:
    """Run the demonstration; `after` is told the outcome, and with `keep` bars go on until Ctrl-C."""
    scene = stage.scene
    scene.directory.mkdir(parents=True, exist_ok=True)
    with _alone(scene.directory):
        train_missing(stage)
        harm = _sabotage(stage) if scene.sabotage else None
        with fresh_server(scene.directory) as server, _worker(stage, port) as (worker, url):
            scene = replace(scene, last_ts=last_shown_ts(time.time_ns() // 1_000_000, keep=scene.keep))
            with _server_may_stop(scene.directory), redis.Redis.from_url(server.url) as client:
                running = Running(stage, Observer(client, stage.keys, url, scene.symbols), worker, server.url)
                outcome = _show(running, scene, harm)
                after(outcome)
                if scene.keep:
                    _keep(running, scene)
            code = worker.stop()
            if code != 0:
                worker.check()
    return outcome


@dataclass(frozen=True)
class Running:
    """A demonstration whose server and worker run."""

    stage: Stage
    observer: Observer
    worker: Child
    server: str


def _show(running: Running, scene: Scene, harm: Sabotage | None) -> show.Outcome:
    """All bars that are published at once, and with sabotage what happens in mid-run."""
    stage = running.stage
    if harm is not None:
        with _feed(running, scene, "--stop", scene.half) as feed:
            _follow(running, feed, scene.symbols * scene.half)
        _swap(running, harm)
    with _feed(running, scene, "--start", scene.half if harm else 0) as feed:
        seconds = _follow(running, feed, scene.bars_in)
    metrics = scene.directory / "metrics.txt"
    counted = tally(running.observer.client, stage.keys)
    story = tell(running.observer.client, stage.keys, harm.in_words) if harm is not None else None
    view = running.observer.look()
    metrics.write_text(view.scrape)
    return show.Outcome(view, counted, seconds, running.observer.url, metrics, scene.served, story)


# ---------------------------------------------------------------------- models


def train_missing(stage: Stage) -> None:
    """Train each agent that has no artifact yet, and show how far that is."""
    scene = stage.scene
    missing = [agent for agent in AGENTS if not discover(scene.models, agent)]
    if not missing:
        stage.say(f"Models: those of an earlier run, in {scene.models}.")
        return
    stage.say(f"Training {', '.join(missing)} on an earlier stretch of that market, once; kept in {scene.models}.")
    arguments = ["worker.demo.trainer", str(scene.models), str(scene.seed)]
    with child("training", arguments, scene.directory / "training.log") as trainer, _bars(stage.console) as progress:
        tasks = {agent: progress.add_task(agent, total=None, start=False) for agent in missing}
        for agent, steps in groupby(_steps(trainer), key=itemgetter(0)):
            progress.start_task(tasks[agent])
            for _, done, total in steps:
                progress.update(tasks[agent], completed=done, total=total)
            # Fewer steps than planned may do.
            progress.update(tasks[agent], completed=total)
            progress.stop_task(tasks[agent])
            if not stage.console.is_terminal:
                stage.say(f"  {agent} trained")


def _bars(console: Console) -> Progress:
    columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description:<9}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _steps(trainer: Child) -> Iterator[tuple[str, int, int]]:
    """Steps as they are done, until the training has ended well. Raises `ChildFailed` where it has not."""
    assert trainer.process.stdout is not None  # noqa: S101  a pipe
    for text in trainer.process.stdout:
        agent, done, total = text.split()
        yield agent, int(done), int(total)
    trainer.process.wait()
    trainer.check(may_end=True)


# ---------------------------------------------------------------------- sabotage


def _sabotage(stage: Stage) -> Sabotage:
    """Copy the models and prepare what will go wrong."""
    with stage.console.status("Sabotage: copying the models, breaking one, retraining another badly"):
        harm = prepare(stage.scene)
    stage.say(f"Sabotage, in copies in {harm.folder}:")
    for line in harm.in_words:
        stage.say(f"  {line}")
    return harm


def _swap(running: Running, harm: Sabotage) -> None:
    """Put the retrained model into the folder and wait until the running worker has it."""
    harm.drop()
    running.stage.say(f"Half of the bars are answered: {harm.collapsing} is put into the folder.")

    def swapped() -> bool:
        running.worker.check()
        told = [e for e in entries(running.observer.client, running.stage.keys.events) if e["agent"] == COLLAPSING]
        refusal = next((event for event in told if event["kind"] == "reload_refused"), None)
        if refusal is not None:
            raise CheckFailed(f"the worker refused {harm.collapsing}: {refusal['reason']}: {refusal['detail']}")
        return any(event["kind"] == "reload" for event in told)

    what = f"the running worker did not take up {harm.collapsing}; see {running.worker.log}: no reload of it"
    wait_until(swapped, SWAP_LIMIT_S, what)


# ---------------------------------------------------------------------- server and worker


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One demonstration a directory: the kernel gives the lock back however this process ends."""
    with (directory / "demo.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                f"another demo runs in {directory}; wait for its end, or give this one a --state-dir of its own"
            ) from None
        yield


@contextlib.contextmanager
def fresh_server(directory: Path) -> Iterator[embedded.EmbeddedServer]:
    """An empty server of the demonstration's own; the data of the run before is dropped here, not at its end."""
    if embedded.find(directory) is None:
        shutil.rmtree(directory / "valkey", ignore_errors=True)
    with embedded.start(directory) as server:
        if not server.started:  # left by a demonstration that was killed
            with redis.Redis.from_url(server.url) as client:
                client.flushall()
        yield server


@contextlib.contextmanager
def _server_may_stop(directory: Path) -> Iterator[None]:
    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise Unavailable(
            f"the demo's server went away: {error}; see {directory / 'valkey' / 'valkey.log'}, then start it again"
        ) from None


@contextlib.contextmanager
def _worker(stage: Stage, port: int) -> Iterator[tuple[Child, str]]:
    """A `quartet run` on the demonstration's server, loaded and waiting for bars, and its URL."""
    scene = stage.scene
    settings = scene.directory / "worker.toml"
    settings.write_text(_settings(scene))
    arguments = ["worker", "run", "--redis", "embedded", "--namespace", stage.keys.namespace]
    arguments += ["--state-dir", str(scene.directory), "--models", str(scene.served), "--config", str(settings)]
    arguments += ["--http-port", str(_free_or_any(stage, port)), "--until-idle", str(IDLE_S)]
    with child("worker", arguments, scene.directory / "worker.log") as worker:
        with stage.console.status("Starting the worker: imports, models, probes"):
            wait_until(lambda: _logged(worker, "ensemble") is not None, START_LIMIT_S, "the worker was not ready")
        line = _logged(worker, "metrics and health") or {}
        stage.say(f"Worker: `quartet run`, process {worker.process.pid}; {line['url']}/metrics, log in {worker.log}.")
        yield worker, line["url"]


def _settings(scene: Scene) -> str:
    """The worker's settings file: whatever ./quartet.toml says does not count."""
    lines = ["# The demo's worker runs on the defaults, but for what this file says."]
    lines += [f"watch_s = {SABOTAGE_WATCH_S}"] if scene.sabotage else []
    lines += [f"retain = {KEPT_ENTRIES}"] if scene.keep else []
    return "\n".join(lines) + "\n"


def _free_or_any(stage: Stage, port: int) -> int:
    """`port`, or 0 where somebody holds it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            stage.say(f"Port {port} cannot be used ({error.strerror}): the metrics get a free one.")
            return 0
    return port


def _logged(worker: Child, event: str) -> dict[str, str] | None:
    """The newest line of the worker's log whose event begins so."""
    worker.check()
    for text in reversed(worker.log.read_text().splitlines()):
        with contextlib.suppress(ValueError):
            line: dict[str, str] = json.loads(text)
            if line.get("event", "").startswith(event):
                return line
    return None


def _feed(running: Running, scene: Scene, *which: str | int) -> contextlib.AbstractContextManager[Child]:
    """Publish the rounds that the flags `which` name."""
    arguments = ["worker.demo.publisher", running.server, running.stage.keys.bars, "--symbols", scene.symbols]
    arguments += ["--bars", scene.bars, "--seed", scene.seed, "--last-ts", scene.last_ts, *which]
    return child("feed", [str(one) for one in arguments], scene.directory / "feed.log")


# ---------------------------------------------------------------------- following


def _follow(running: Running, feed: Child, until: int) -> float:
    """Watch until `until` bars have been answered; the seconds since the first one was published."""
    observer, total, seconds = running.observer, running.stage.scene.bars_in, 0.0
    seen, moved = 0, time.monotonic()
    with _screen(running.stage) as screen:
        while True:
            _alive(running, feed, may_end=True)
            view = observer.look()
            if view.lengths["bars"]:
                seconds = time.time() - observer.first_bar_ms() / 1000
            screen(view, total, seconds)
            if view.consumed >= until:
                return seconds
            if view.consumed > seen:
                seen, moved = view.consumed, time.monotonic()
            if time.monotonic() - moved > STALL_S:
                log = running.worker.log
                raise Unavailable(
                    f"the worker has answered no bar for {STALL_S:.0f} s, {seen:,} of {total:,} so far; "
                    f"{log} ends: {tail(log)}"
                )
            time.sleep(REFRESH_S)


def _keep(running: Running, scene: Scene) -> None:
    """Go on with new bars after those of `scene` until Ctrl-C."""
    stage, started = running.stage, time.monotonic()
    with _feed(running, scene, "--keep") as feed, _screen(stage, every_s=60.0) as screen:
        while True:
            _alive(running, feed, may_end=False)
            view = running.observer.look()
            screen(view, view.consumed, time.monotonic() - started)
            (stage.scene.directory / "metrics.txt").write_text(view.scrape)
            time.sleep(1.0)


def _alive(running: Running, feed: Child, *, may_end: bool) -> None:
    """Raises where a process ended that should not have; that the server is gone comes first."""
    running.worker.check()
    try:
        feed.check(may_end=may_end)
    except ChildFailed:
        running.observer.client.ping()
        raise


@contextlib.contextmanager
def _screen(stage: Stage, every_s: float = LINE_EVERY_S) -> Iterator[Callable[[View, int, float], None]]:
    """A table that renews itself on a terminal, a line every few seconds elsewhere."""
    if stage.console.is_terminal:
        with Live(console=stage.console, auto_refresh=False, transient=True) as screen:
            yield lambda view, total, seconds: screen.update(show.live(view, total, seconds), refresh=True)
        return
    spoken = time.monotonic()

    def speak(view: View, total: int, seconds: float) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= every_s:
            spoken = time.monotonic()
            stage.say(show.line(view, total, seconds))

    yield speak

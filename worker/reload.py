"""Models come and go beside the running ones: loaded in a thread of their own, swapped between two batches."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from agents.agent import Refusal
from agents.artifacts import Loading, LoadOptions, discover, judge_newer, load_agent, load_exact, load_file
from agents.discovery import PREFIXES, candidate_of, ranks_above
from streams.messages import Entry, Event, Reason, Reject
from worker import control
from worker.control import BadOrderError, Order
from worker.roster import Artifact, Record
from worker.stages.agents import AgentGroup
from worker.voting import compute_alone

Listing = tuple[tuple[str, int, int], ...]
"""Names, sizes and times of an agent's files: a hint that something changed, never what decides."""


class Shelf:
    """The artifacts of the models folder, and those loaded already."""

    def __init__(self, models: Path, options: LoadOptions) -> None:
        self.models = models
        self.options = options
        self._held: dict[tuple[str, Artifact], Loading] = {}
        self._served: dict[tuple[str, Artifact | None, bool], Loading] = {}

    def newest(self, agent: str) -> Loading:
        """The artifact that the folder selects for `agent`, read again."""
        return self._hold(load_agent(self.models, agent, self.options))

    def named(self, agent: str, file: str) -> Loading:
        """One file: in the folder, or where its path says."""
        inside = self.models / file
        return self._hold(load_file(inside if Path(file).name == file else Path(file), agent, self.options))

    def exact(self, agent: str, artifact: Artifact) -> Loading:
        """The artifact of that hash and no other, with the scaler and metadata that it served with."""
        loading = self._same_file(agent, artifact)
        if loading.model is None or artifact.is_beside(Artifact.of(loading.model)):
            return loading
        detail = (
            f"the scaler or the metadata beside {loading.model.file.name} are not those that it served with: put them "
            f"back, or serve what is there with `quartet models reload {agent}`"
        )
        return Loading(agent, None, Refusal(Reason.NO_ARTIFACT, detail), loading.candidate, loading.facts)

    def _same_file(self, agent: str, artifact: Artifact) -> Loading:
        """The model file of that hash; another scaler or other metadata may lie beside it by now."""
        held = self._held.get((agent, artifact))
        if held is not None:
            return held
        return self._hold(load_exact(self.models, agent, artifact.file, artifact.sha256, self.options))

    def serving(self, agent: str, record: Record) -> Loading:
        """What serves after a start: what the state names, if it is at hand; else the newest, unless it is pinned.

        Where a newer file is refused, the loading tells that too.
        """
        key = agent, record.artifact, record.pinned
        if key not in self._served:
            self._served[key] = self._serve(agent, record)
        return self._served[key]

    def _serve(self, agent: str, record: Record) -> Loading:
        if record.artifact is None:
            return self.newest(agent)
        find = self.exact if record.pinned else self._same_file
        loading = find(agent, record.artifact)
        if record.pinned:
            return loading
        return self.newest(agent) if loading.model is None else judge_newer(loading, self.models, self.options)

    def _hold(self, loading: Loading) -> Loading:
        if loading.model is not None:
            self._held[loading.agent, Artifact.of(loading.model)] = loading
        return loading

    def keep(self, *records: Mapping[str, Record]) -> None:
        """Let go of every model that no record names."""
        named = {
            (agent, artifact)
            for each in records
            for agent, record in each.items()
            for artifact in (record.artifact, record.before, record.trial and record.trial.artifact)
            if artifact
        }
        self._held = {key: loading for key, loading in self._held.copy().items() if key in named}
        self._served = {}


@dataclass(frozen=True)
class Found:
    """What a look at the folder found: artifacts that were loaded, and of pinned agents the newer file."""

    loadings: Sequence[Loading] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)


class Watcher:
    """Which artifact of the folder is new, complete and ranks above the one that serves."""

    def __init__(self, models: Path, known: Mapping[str, str]) -> None:
        """`known` is the file of each agent that was judged already: the one that serves, or was refused."""
        self._models = models
        self._known = dict(known)
        self._seen: dict[str, Listing] = {}
        self._settled: dict[str, Listing] = {}

    def look(self, serving: Mapping[str, str]) -> list[str]:
        """The agents, among those of `serving` (agent to the file it serves), whose newest artifact is to be loaded.

        Files are taken once two looks saw them alike: the model is written last, and may still grow.
        """
        listings = _listings(self._models, serving)
        ripe = [agent for agent, listing in listings.items() if self._seen.get(agent) == listing]
        self._seen |= listings
        return [agent for agent in ripe if self._is_new(agent, serving[agent], listings[agent])]

    def _is_new(self, agent: str, serves: str, listing: Listing) -> bool:
        first = agent not in self._settled
        if self._settled.get(agent) == listing:
            return False
        self._settled[agent] = listing
        best = next(iter(discover(self._models, agent)), None)
        if best is None or (first and best.file.name == self._known.get(agent)):
            return False
        running = candidate_of(Path(serves), agent) if serves else None
        return running is None or best.file.name == running.file.name or ranks_above(best, running)


def _listings(models: Path, agents: Iterable[str]) -> dict[str, Listing]:
    """The files of each agent in the folder."""
    try:
        with os.scandir(models) as found:
            files = [(e.name, e.stat(follow_symlinks=False)) for e in found]
    except OSError:
        return {}  # a folder that is away for a moment, or a file that was being renamed: the next look sees
    rows = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
    return {agent: tuple(row for row in rows if row[0].startswith(PREFIXES[agent])) for agent in agents}


@dataclass(frozen=True)
class Steered:
    """What was changed between two batches: the orders that took effect, and what to say of it."""

    entries: Sequence[Entry] = ()
    events: Sequence[Event] = ()
    rejects: Sequence[Reject] = ()

    def __bool__(self) -> bool:
        return bool(self.entries or self.events or self.rejects)

    def __add__(self, other: Steered) -> Steered:
        return Steered((*self.entries, *other.entries), (*self.events, *other.events), (*self.rejects, *other.rejects))


@dataclass
class Pending:
    """An order that waits for its turn and its models. `entry` is None where it did not come over the stream.

    One that is `passed_over` is another process's to carry out or to refuse.
    """

    entry: Entry | None
    order: Order | None
    problem: str = ""
    passed_over: bool = False
    loads: list[Future[Loading]] | None = field(default=None)


class Steering:
    """Orders and the models folder, for one worker's loop: nothing here waits, `take` gives what is ready.

    `configured` are all agents where this process serves only some: orders for others are passed over then, and
    what is no order, or asks for what nobody can do, is answered by the consensus stage.
    """

    def __init__(self, agents: Sequence[str], shelf: Shelf, configured: Sequence[str] = ()) -> None:
        self.agents = agents
        self.shelf = shelf
        self._configured = configured or agents
        self._alone = self._configured == agents
        self._threads = ThreadPoolExecutor(1, "loader", initializer=compute_alone)
        self._queue: deque[Pending] = deque()
        self._watcher: Watcher | None = None
        self._look: Future[Found] | None = None
        self._told: dict[str, str] = {}

    @property
    def waiting(self) -> bool:
        """Whether an order waits; nothing more of the control stream is read meanwhile."""
        return bool(self._queue)

    def start(self, loadings: Sequence[Loading]) -> None:
        """Forget what waits, which will be read again; `loadings` are what serves or was refused."""
        self._queue.clear()
        self._look, self._told = None, {}
        judged = {x.agent: x.passed_over[0] if x.passed_over else x.candidate for x in loadings}
        known = {agent: candidate.file.name for agent, candidate in judged.items() if candidate is not None}
        self._watcher = Watcher(self.shelf.models, known)

    def close(self) -> None:
        """Wait for a load that is going on: a thread inside a library may not be left behind."""
        self._threads.shutdown(cancel_futures=True)

    def receive(self, entries: Iterable[Entry]) -> None:
        """Queue the entries of the control stream."""
        self._queue.extend(self._pending(entry) for entry in entries)

    def _pending(self, entry: Entry) -> Pending:
        try:
            order = control.parse(entry, self._configured)
        except BadOrderError as error:
            return Pending(entry, None, str(error), passed_over=not self._alone)
        return Pending(entry, order, passed_over=order.agent not in ("", *self.agents))

    def reload_all(self, by: str) -> None:
        """As the order, without an entry of the stream: for a signal."""
        self._queue.append(Pending(None, Order("reload", by=by)))

    def look(self, group: AgentGroup) -> None:
        """Look at the folder, in the background; what is new is loaded there."""
        if self._look is None and self._watcher is not None:
            self._look = self._threads.submit(self._look_now, self._watcher, watched(group), pinned(group))

    def _look_now(self, watcher: Watcher, free: Mapping[str, str], pins: Mapping[str, str]) -> Found:
        changed = watcher.look({**free, **pins})
        newer = {agent: _newer(self.shelf.models, agent, pins[agent]) for agent in changed if agent in pins}
        return Found(
            [_loaded(partial(self.shelf.newest, agent), agent) for agent in changed if agent in free],
            {agent: file for agent, file in newer.items() if file},
        )

    def take(self, group: AgentGroup) -> Steered:
        """Change the agents by all that is ready, in order; between two batches only."""
        steered = Steered()
        while self._queue and (done := self._attempt(self._queue[0], group)) is not None:
            self._queue.popleft()
            steered += done
        if self._look is not None and self._look.done():
            found, self._look = self._look.result(), None
            steered += Steered(events=self._found(group, found))
        return steered

    def _found(self, group: AgentGroup, found: Found) -> list[Event]:
        """Swap in what the folder has brought; an agent that was pinned meanwhile, or the same bytes, stay."""
        free, pins = watched(group), pinned(group)
        changed = [x for x in found.loadings if x.agent in free and not _serves(group, x)]
        waiting = {
            agent: file for agent, file in found.waiting.items() if agent in pins and self._told.get(agent) != file
        }
        self._told |= waiting
        return [
            *(control.reload(group, loading, None) for loading in changed),
            *(control.skipped(group, agent, {"file": file}) for agent, file in waiting.items()),
        ]

    def _attempt(self, pending: Pending, group: AgentGroup) -> Steered | None:
        """Carry out one order; None while its models are being loaded."""
        entries = () if pending.entry is None else (pending.entry,)
        if pending.passed_over:
            return Steered(entries)
        if pending.order is None:
            rejects = [Reject(entry, control.REASON, pending.problem, control.STAGE) for entry in entries]
            return Steered(entries, rejects=rejects)
        if pending.loads is None:
            pending.loads = self._load(pending.order, group)
        if not all(load.done() for load in pending.loads):
            return None
        events = self._carry_out(pending.order, [load.result() for load in pending.loads], group)
        return Steered(entries, events=events)

    def _load(self, order: Order, group: AgentGroup) -> list[Future[Loading]]:
        """Start loading what the order needs."""
        record = group.records.get(order.agent)
        calls: list[tuple[str, Callable[[], Loading]]] = []
        if order.order == "reload":
            calls = [(agent, partial(self.shelf.newest, agent)) for agent in self._reloaded(order, group)]
        elif order.order in control.TRIALS and record is not None and record.trial is None:
            calls = [(order.agent, partial(self.shelf.named, order.agent, order.file))]
        elif order.order == "rollback" and record is not None and record.trial is None and record.before is not None:
            calls = [(order.agent, partial(self.shelf.exact, order.agent, record.before))]
        return [self._threads.submit(_loaded, call, agent) for agent, call in calls]

    def _reloaded(self, order: Order, group: AgentGroup) -> list[str]:
        """The agents that a reload is about: the named one, or all that are not pinned."""
        return [order.agent] if order.agent else [a for a in self.agents if not group.records[a].pinned]

    def _carry_out(self, order: Order, loaded: Sequence[Loading], group: AgentGroup) -> list[Event]:
        if order.order == "reload":
            events = [control.reload(group, loading, order) for loading in loaded]
            left_out = [] if order.agent else [a for a in self.agents if a not in {x.agent for x in loaded}]
            return [*events, *(control.skipped(group, agent, order.evidence()) for agent in left_out)]
        if order.order in control.TRIALS:
            nothing = Loading(order.agent)
            return [control.begin_trial(group, order, loaded[0] if loaded else nothing)]
        if order.order == "rollback":
            if group.records[order.agent].trial is not None:
                return [control.end_trial(group, order)]
            return [control.go_back(group, order, loaded[0] if loaded else None)]
        if order.order == "unmute":
            return [control.unmute(group, order, alone=self._alone)]
        act = {"mute": control.mute, "promote": control.promote}[order.order]
        return [act(group, order)]


def watched(group: AgentGroup) -> dict[str, str]:
    """The agents that a newer file of the folder may replace, and the file that each serves, if any."""
    return {
        agent: Path(record.artifact.file).name if record.artifact and group.voting.serves(agent) else ""
        for agent, record in group.records.items()
        if not record.pinned and record.trial is None
    }


def pinned(group: AgentGroup) -> dict[str, str]:
    """The agents that a promotion or rollback pinned, and the file to which, if any."""
    return {
        agent: Path(record.artifact.file).name if record.artifact else ""
        for agent, record in group.records.items()
        if record.pinned and record.trial is None
    }


def _newer(models: Path, agent: str, file: str) -> str:
    """The file that the folder selects for `agent`, if it ranks above `file`."""
    best, pin = next(iter(discover(models, agent)), None), candidate_of(Path(file), agent) if file else None
    return best.file.name if best is not None and (pin is None or ranks_above(best, pin)) else ""


def _serves(group: AgentGroup, loading: Loading) -> bool:
    record = group.records[loading.agent]
    if loading.model is None or record.artifact is None:
        return False
    return group.voting.serves(loading.agent) and record.artifact.is_same(Artifact.of(loading.model))


def _loaded(load: Callable[[], Loading], agent: str) -> Loading:
    """What `load` gives; whatever goes wrong beside a running model is a refusal, never the end of the worker."""
    try:
        return load()
    except Exception as error:  # noqa: BLE001 - said in the event, with its text
        return Loading(agent, refusal=Refusal(Reason.CORRUPT_ARTIFACT, f"it cannot be loaded: {error!r}"))

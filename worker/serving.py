"""`quartet run`: the process of a stage, or of all of them chained, put together and served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from streams.contracts import V3
from streams.formats import FormatReader
from streams.inputs import Inputs
from streams.keys import AGENT, CHAIN, CONSENSUS, FEATURES, Keys, agent_stage
from streams.redis import RedisStore, connect
from worker.assembly import (
    check_way,
    limits_of,
    load_agents,
    load_options,
    open_client,
    pipeline_factory,
    rules_of,
    server_url,
    stored_records,
    tell_loading,
    use_one_thread_a_model,
)
from worker.decoding import SeriesBook
from worker.errors import UsageError
from worker.http import HttpServer, Probes
from worker.lease import LeaseKeeper
from worker.metrics import Metrics
from worker.notify import Notifier
from worker.page import Page
from worker.processes.agent import THRESHOLDS, AgentProcess, read_thresholds
from worker.processes.base import Options, Process
from worker.processes.consensus import ConsensusProcess
from worker.processes.features import FeatureProcess
from worker.reload import Shelf
from worker.roster import Record
from worker.sensors import Sensors
from worker.service import Worker
from worker.settings import Settings, mask
from worker.stages.agents import AgentGroup
from worker.stages.consensus import ConsensusStage
from worker.stages.features import FeatureStage
from worker.status import AGENT_NEEDS, CHAIN_NEEDS, FEATURES_NEED, Status
from worker.voting import Seat


def serve(settings: Settings, options: Options, log: FilteringBoundLogger, stage: str = CHAIN) -> None:
    """`quartet run`: everything from the server to the last commit."""
    if settings.broker is not None:
        from worker.kafka.serving import serve as serve_kafka  # noqa: PLC0415  only what needs Kafka pays for it

        if stage != CHAIN:
            raise UsageError("--stage is for Redis: on Kafka each partition runs the whole chain; add workers instead")
        serve_kafka(settings, options, log)
        return
    with server_url(settings, start=True) as url:
        client = open_client(url)
        keys = Keys(settings.namespace)
        check_way(client, keys, stage)
        store = RedisStore(client, keys, stage, lease_s=lease_s(settings, stage), retain=settings.retain)
        log.info("server", url=mask(url), namespace=settings.namespace)
        given = _Given(settings, options, log, store)
        page = _page(given, connect(url)) if stage in (CHAIN, CONSENSUS) else None
        site = page.answer if page else None
        probes = Probes(given.registry, lambda: given.status.heartbeat, given.status.readiness, site=site)
        http = HttpServer(probes, settings.http_host, settings.http_port)
        log.info("metrics and health", url=http.url, **({"page": f"{http.url}/"} if page else {}))
        try:
            process = _PROCESSES[stage.partition(":")[0]](given)
            twin = store.with_client(connect(url))
            process.run(LeaseKeeper(twin.renew, lambda: given.status.heartbeat, lease_s(settings, stage) / 4, log))
        finally:
            if page:
                page.close()
            http.close()


def lease_s(settings: Settings, stage: str) -> float:
    """Seconds of silence after which a standby takes a stage over: an agent's comes before the agent is called late."""
    return min(settings.lease_s, settings.deadline_s / 2) if stage.startswith(AGENT) else settings.lease_s


class _Given:
    """What every process is made of; what differs follows from the stage of the store."""

    def __init__(self, settings: Settings, options: Options, log: FilteringBoundLogger, store: RedisStore) -> None:
        self.settings, self.options, self.log, self.store = settings, options, log, store
        kind, _, agent = store.stage.partition(":")
        self.agent = agent
        self.shelf = Shelf(settings.models, load_options(settings))
        mine = {CHAIN: settings.agents, FEATURES: (), CONSENSUS: ()}.get(kind, (agent,))
        needs = {FEATURES: FEATURES_NEED, "agent": AGENT_NEEDS}.get(kind, CHAIN_NEEDS)
        known = {FEATURES: (), "agent": (agent,)}.get(kind, settings.agents)
        self.status = Status(known, settings.quorum, needs=needs)
        self.registry = CollectorRegistry()
        self.sensors = Sensors(Metrics(self.registry, mine))

    @property
    def common(self) -> dict[str, Any]:
        return {
            "sensors": self.sensors,
            "status": self.status,
            "log": self.log,
            "options": self.options,
            "notifier": Notifier.from_environment(),
        }


def _page(given: _Given, client: redis.Redis) -> Page:
    settings = given.settings
    return Page(
        client,
        given.store.keys,
        given.status.readiness,
        quorum=settings.quorum,
        warmup_bars=settings.warmup_bars[V3.name],
        stage=CHAIN if given.store.stage == CHAIN else FEATURES,
    )


def _worker(given: _Given) -> Process:
    use_one_thread_a_model()
    shelf = given.shelf
    records = stored_records(given.store, rebuild=given.options.rebuild)
    load_agents(given.settings, records, shelf, given.log)
    return Worker(given.settings, given.store, pipeline_factory(given.settings), shelf, records, **given.common)


def _feature_process(given: _Given) -> Process:
    settings = given.settings
    if not settings.feature_sets:
        use_one_thread_a_model()
        load_agents(settings, _records_of_agents(given), given.shelf, given.log)

    def make() -> FeatureStage:
        return FeatureStage(
            limits_of(settings),
            always=settings.feature_sets or _sets_of_models(given),
            fixed=True,
            warmup_bars=settings.warmup_bars,
            reader=FormatReader(rules_of(settings)),
            several_keys=Inputs(settings.input_keys, settings.namespace).several,
        )

    return FeatureProcess(settings, given.store, make, **given.common)


def _records_of_agents(given: _Given) -> dict[str, Record]:
    """What serves by the state of each agent's own process."""
    records: dict[str, Record] = {}
    for agent in given.settings.agents:
        store = RedisStore(given.store.client, given.store.keys, agent_stage(agent))
        records |= stored_records(store, rebuild=given.options.rebuild)
    return records


def _sets_of_models(given: _Given) -> tuple[str, ...]:
    """The feature sets that models read: of those that serve or are on trial, as their own processes load them now."""
    records, shelf = _records_of_agents(given), given.shelf
    shelf.keep(records)  # what was newest when this process began may not be so any more
    loadings = [shelf.serving(agent, records.get(agent, Record())) for agent in given.settings.agents]
    loadings += [shelf.exact(agent, record.trial.artifact) for agent, record in records.items() if record.trial]
    shelf.keep()
    return tuple(dict.fromkeys(x.model.feature_set for x in loadings if x.model is not None))


def _agent_process(given: _Given) -> Process:
    use_one_thread_a_model()
    settings, shelf = given.settings, given.shelf
    records = stored_records(given.store, rebuild=given.options.rebuild)
    tell_loading(shelf.serving(given.agent, records.get(given.agent, Record())), given.log)

    def make(seats: Sequence[Seat], book: SeriesBook) -> AgentGroup:
        return AgentGroup(
            seats,
            book,
            window_capacity=settings.window_capacity,
            quality=settings.quality,
            canary_share=settings.canary_share,
            canary_period_ms=round(settings.canary_hours * 3_600_000),
        )

    return AgentProcess(settings, given.agent, given.store, make, shelf, records, **given.common)


def _consensus_process(given: _Given) -> Process:
    settings, store = given.settings, given.store
    for agent in settings.agents:
        given.sensors.metrics.add_voter(agent)

    def make() -> ConsensusStage:
        return ConsensusStage(
            len(settings.agents),
            quorum=settings.quorum,
            canary_share=settings.canary_share,
            ensemble=settings.ensemble,
        )

    def thresholds() -> dict[str, float]:
        found: dict[str, float] = {}
        for agent in settings.agents:
            found |= read_thresholds(RedisStore(store.client, store.keys, agent_stage(agent)).part(THRESHOLDS))
        return found

    return ConsensusProcess(settings, store, make, thresholds, **given.common)


_PROCESSES: Mapping[str, Callable[[_Given], Process]] = {
    CHAIN: _worker,
    FEATURES: _feature_process,
    "agent": _agent_process,
    CONSENSUS: _consensus_process,
}

"""Puts a worker together from its settings: the server, the models, the pipeline, metrics and HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import redis
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from agents.artifacts import Loading, LoadOptions
from streams import embedded
from streams.codec import StateCorruptError
from streams.contracts import V3
from streams.formats import FormatReader, InputRule
from streams.inputs import Inputs
from streams.keys import Keys
from streams.redis import RedisStore, check_server, connect
from streams.store import StoreUnavailableError
from streams.validation import Limits
from worker.errors import CheckFailed, Unavailable, expected
from worker.http import HttpServer, Probes
from worker.lease import LeaseKeeper
from worker.metrics import Metrics
from worker.notify import Notifier
from worker.page import Page
from worker.pipeline import Pipeline
from worker.reload import Shelf
from worker.roster import Record, records_of
from worker.sensors import Sensors
from worker.service import Options, Worker
from worker.settings import EMBEDDED, Settings, mask
from worker.status import Status
from worker.voting import Seat


def limits_of(settings: Settings) -> Limits:
    """What the feed may send, from the settings."""
    return Limits(
        intervals=None if settings.intervals is None else frozenset(settings.intervals),
        clock_skew_ms=round(settings.clock_skew_s * 1000),
        max_gap_bars=settings.max_gap_bars,
        max_symbols=settings.max_symbols,
        max_bar_age_intervals=settings.max_bar_age_intervals,
        frozen_bars=settings.frozen_bars,
        jump_ratio=settings.jump_ratio,
    )


def rules_of(settings: Settings) -> tuple[InputRule, ...]:
    """What some inputs do not say themselves, from the settings."""
    return tuple(
        InputRule(pattern, said.get("symbol"), said.get("interval"), said.get("closed"), said.get("prefix", ""))
        for pattern, said in settings.inputs.items()
    )


def load_options(settings: Settings) -> LoadOptions:
    """How artifacts are loaded, from the settings."""
    return LoadOptions(
        allow_unscaled=frozenset(settings.allow_unscaled),
        threshold=settings.threshold,
        residual_std=settings.residual_std,
    )


def use_one_thread_a_model() -> None:
    """Two torch threads were often slower than one on two cores, and models run side by side anyway."""
    import torch  # noqa: PLC0415  seconds that only a worker needs

    torch.set_num_threads(1)


def load_agents(
    settings: Settings, records: Mapping[str, Record], shelf: Shelf, log: FilteringBoundLogger
) -> list[Loading]:
    """Load and probe what serves for every configured agent, one log line each.

    Raises `CheckFailed` where not one of them has a model that may vote.
    """
    loadings = []
    for agent in settings.agents:
        loading = shelf.serving(agent, records.get(agent, Record()))
        loadings.append(loading)
        _tell(loading, log)
    if all(loading.model is None for loading in loadings):
        reasons = "; ".join(f"{x.agent}: {x.refusal.reason}" for x in loadings if x.refusal)
        raise CheckFailed(
            f"no agent can vote with what is in {settings.models} ({reasons}). Train models there with "
            f"`quartet train --bars FILE --agent all --models {settings.models}`, or name another folder with "
            "--models; `quartet models list` says what was found"
        )
    return loadings


def _tell(loading: Loading, log: FilteringBoundLogger) -> None:
    model, candidate = loading.model, loading.candidate
    if model is None:
        refusal = loading.refusal
        log.error(
            "agent refused",
            agent=loading.agent,
            reason=str(refusal.reason) if refusal else "",
            detail=refusal.detail if refusal else "",
            file=candidate.file.name if candidate else None,
            **{name: loading.facts[name] for name in ("architecture", "input_shape") if name in loading.facts},
        )
        return
    log.info(
        "agent loaded",
        agent=loading.agent,
        file=model.file.name,
        version=model.version,
        generation=candidate.generation if candidate else None,
        architecture=model.architecture,
        input_shape=model.input_shape,
        outputs=model.outputs,
        parameters=model.parameters,
        **loading.facts.get("dimensions", {}),
        scaler=loading.facts.get("scaler"),
        feature_set=model.feature_set,
        contract=model.contract[:12],
        sha256=model.sha256[:12],
        probe="passed",
        detail=model.detail or None,
    )


def pipeline_factory(settings: Settings) -> Callable[[Sequence[Seat]], Pipeline]:
    """Makes fresh pipelines over given seats."""

    def make(seats: Sequence[Seat]) -> Pipeline:
        return Pipeline(
            seats,
            quorum=settings.quorum,
            limits=limits_of(settings),
            feature_sets=settings.feature_sets,
            warmup_bars=settings.warmup_bars,
            window_capacity=settings.window_capacity,
            quality=settings.quality,
            ensemble=settings.ensemble,
            reader=FormatReader(rules_of(settings)),
            canary_share=settings.canary_share,
            canary_period_ms=round(settings.canary_hours * 3_600_000),
            several_keys=Inputs(settings.input_keys, settings.namespace).several,
        )

    return make


@contextmanager
def server_url(settings: Settings, *, start: bool) -> Iterator[str]:
    """The server's URL; with `start` the embedded one is started if none runs.

    Raises `Unavailable` where the embedded one does not run and may not be started.
    """
    if settings.redis != EMBEDDED:
        yield settings.redis
    elif start:
        with embedded.start(settings.state_dir) as server:
            yield server.url
    else:
        url = embedded.find(settings.state_dir)
        if url is None:
            raise Unavailable(
                f"no embedded server runs in {settings.state_dir}; start one with `quartet run` or `quartet demo`, "
                "or name a server with --redis URL"
            )
        yield url


def open_client(url: str) -> redis.Redis:
    """A client of a server that can keep the promises.

    Raises `Unavailable`, which names the server, where it does not serve, and what `check_server` raises else.
    """
    client = connect(url)
    try:
        check_server(client)
    except StoreUnavailableError as error:
        raise expected(error, mask(url)) or error from error
    return client


def stored_records(store: RedisStore, *, rebuild: bool) -> dict[str, Record]:
    """What the state says that serves; nothing with `rebuild` where it cannot be read."""
    try:
        return records_of(store.load(("agents",)).state["agents"])
    except StateCorruptError:
        if not rebuild:
            raise
        return {}


def serve(settings: Settings, options: Options, log: FilteringBoundLogger) -> None:
    """`quartet run`: everything from the server to the last commit."""
    use_one_thread_a_model()
    with server_url(settings, start=True) as url:
        client = open_client(url)
        keys = Keys(settings.namespace)
        store = RedisStore(client, keys, lease_s=settings.lease_s, retain=settings.retain)
        log.info("server", url=mask(url), namespace=settings.namespace)
        status = Status(settings.agents, settings.quorum)
        registry = CollectorRegistry()
        sensors = Sensors(Metrics(registry, settings.agents))
        page = Page(
            connect(url), keys, status.readiness, quorum=settings.quorum, warmup_bars=settings.warmup_bars[V3.name]
        )
        probes = Probes(registry, lambda: status.heartbeat, status.readiness, site=page.answer)
        http = HttpServer(probes, settings.http_host, settings.http_port)
        log.info("metrics and health", url=http.url, page=f"{http.url}/")
        try:
            shelf = Shelf(settings.models, load_options(settings))
            records = stored_records(store, rebuild=options.rebuild)
            load_agents(settings, records, shelf, log)
            worker = Worker(
                settings,
                store,
                pipeline_factory(settings),
                shelf,
                records,
                sensors=sensors,
                status=status,
                log=log,
                options=options,
                notifier=Notifier.from_environment(),
            )
            twin = store.with_client(connect(url))
            worker.run(LeaseKeeper(twin.renew, lambda: status.heartbeat, settings.lease_s / 4, log))
        finally:
            page.close()
            http.close()

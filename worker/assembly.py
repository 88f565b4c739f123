"""What a worker is put together from, by its settings: the server, the models, the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import redis
from structlog.typing import FilteringBoundLogger

from agents.artifacts import Loading, LoadOptions
from streams import embedded
from streams.codec import StateCorruptError
from streams.formats import FormatReader, InputRule
from streams.inputs import Inputs
from streams.keys import CHAIN, CONSENSUS, FEATURES, Keys, agent_stage
from streams.messages import AGENTS
from streams.redis import RedisStore, check_server, connect
from streams.store import StoreUnavailableError
from streams.validation import Limits
from worker.errors import CheckFailed, Unavailable, expected
from worker.pipeline import Pipeline
from worker.reload import Shelf
from worker.roster import Record, records_of
from worker.settings import EMBEDDED, Settings, mask
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
        tell_loading(loading, log)
    if all(loading.model is None for loading in loadings):
        reasons = "; ".join(f"{x.agent}: {x.refusal.reason}" for x in loadings if x.refusal)
        raise CheckFailed(
            f"no agent can vote with what is in {settings.models} ({reasons}). Train models there with "
            f"`quartet train --bars FILE --agent all --models {settings.models}`, or name another folder with "
            "--models; `quartet models list` says what was found"
        )
    return loadings


def tell_loading(loading: Loading, log: FilteringBoundLogger) -> None:
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


def pipeline_factory(
    settings: Settings, fixed_sets: Sequence[str] | None = None
) -> Callable[[Sequence[Seat]], Pipeline]:
    """Makes fresh pipelines over given seats; with `fixed_sets` they compute these, whatever the models read."""

    def make(seats: Sequence[Seat]) -> Pipeline:
        return Pipeline(
            seats,
            quorum=settings.quorum,
            limits=limits_of(settings),
            feature_sets=settings.feature_sets if fixed_sets is None else fixed_sets,
            fixed_sets=fixed_sets is not None,
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


def stage_names(settings: Settings) -> tuple[str, ...]:
    """What `--stage` may name."""
    return FEATURES, *map(agent_stage, settings.agents), CONSENSUS


def check_way(client: redis.Redis, keys: Keys, stage: str) -> None:
    """Raise `CheckFailed` where the namespace was run the other way: its state is that of the chain, or of stages."""
    others = [CHAIN] if stage != CHAIN else [FEATURES, CONSENSUS, *map(agent_stage, AGENTS)]
    # TYPE and not EXISTS, which the worker has no right to under the shipped ACL.
    found = next((other for other in others if client.type(keys.owner(other)) != b"none"), None)
    if found is None:
        return
    was, here = ("in one process", "in stages") if found == CHAIN else ("in stages", "in one process")
    again = "`quartet run`" if found == CHAIN else "`quartet run --stage NAME`"
    raise CheckFailed(
        f"namespace {keys.namespace} was run {was} ({keys.owner(found)} is there), and its state is not converted: go "
        f"on with {again}, or run {here} under another --namespace"
    )

"""`quartet bridge`: bars from Redis to Kafka, until SIGTERM."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import Bars, reading, with_layers
from worker.settings import Layer, Settings, resolve

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from worker.bridge import BridgeOptions


@with_layers
def bridge(
    layers: tuple[Layer, ...],
    to: Annotated[
        str | None, typer.Option("--to", metavar="URL", help="The Kafka cluster, kafka://HOST:PORT[,HOST:PORT].")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="The Redis server; --redis unless given.")
    ] = None,
    bars: Bars = None,
    until_idle: Annotated[
        float | None,
        typer.Option("--until-idle", metavar="SECONDS", min=0, help="Stop once the input was silent this long."),
    ] = None,
    accept_gap: Annotated[
        bool, typer.Option("--accept-gap", help="Go on past input that is gone now, and count it as lost.")
    ] = False,
    from_start: Annotated[
        bool, typer.Option("--from-start", help="Forget how far it was; carry all that Redis holds. For new topics.")
    ] = False,
) -> None:
    """Carry bars from the input keys on Redis to the topic of bars on Kafka, each to the partition of its symbol.

    Formats are recognised as a worker recognises them; what travels is the contract's JSON, up to 256 bars in a record.
    The position is kept on Redis: after a crash it goes on where it was, and a second bridge stands by.
    Orders of `quartet models` are not carried.
    """
    from worker.bridge import BridgeOptions
    from worker.logs import make_logger

    given = [(flag, {name: url}) for flag, name, url in (("--from", "redis", source), ("--to", "broker", to)) if url]
    settings = resolve((*given, *layers))
    options = BridgeOptions(until_idle, accept_gap, from_start)

    def stop(_number: int, _frame: Any) -> None:
        options.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    _carry(reading(settings, bars), options, make_logger(settings.log_level))


def _carry(settings: Settings, options: BridgeOptions, log: FilteringBoundLogger) -> None:
    """Put a bridge together and let it run."""
    from prometheus_client import CollectorRegistry

    from streams.formats import FormatReader
    from streams.inputs import Inputs
    from streams.keys import Keys
    from streams.redis import RedisStore, connect
    from streams.topics import Topics
    from worker.assembly import open_client, rules_of, server_url
    from worker.bridge import Bridge
    from worker.carriage import STAGE
    from worker.errors import UsageError
    from worker.http import HttpServer, Probes
    from worker.lease import LeaseKeeper
    from worker.metrics import BridgeMetrics
    from worker.outages import BridgeStatus
    from worker.settings import mask
    from worker.sink import KafkaSink, bootstrap_of

    if settings.broker is None:
        raise UsageError("no Kafka cluster is named: give --to kafka://HOST:PORT, or set QUARTET_BROKER")
    bootstrap = bootstrap_of(settings.broker)
    try:
        topics = Topics(settings.namespace)
    except ValueError as error:
        raise UsageError(str(error)) from None
    status, registry = BridgeStatus(), CollectorRegistry()
    with server_url(settings, start=False) as url:
        store = RedisStore(open_client(url), Keys(settings.namespace), STAGE, lease_s=settings.lease_s)
        log.info("bridge", source=mask(url), to=bootstrap, namespace=settings.namespace, topic=topics.bars)
        bridge = Bridge(
            store,
            topics,
            lambda names, waiting: KafkaSink(bootstrap, names, waiting),
            Inputs(settings.input_keys, settings.namespace),
            lambda: FormatReader(rules_of(settings)),
            metrics=BridgeMetrics(registry),
            status=status,
            log=log,
            options=options,
        )
        probes = Probes(registry, lambda: status.heartbeat, status.readiness)
        http = HttpServer(probes, settings.http_host, settings.http_port)
        log.info("metrics and health", url=http.url)
        twin = store.with_client(connect(url))
        try:
            bridge.run(LeaseKeeper(twin.renew, lambda: status.heartbeat, settings.lease_s / 4, log))
        finally:
            http.close()

"""The two ways into the Kafka engine: `quartet run --broker`, and Faust's own command."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from structlog.typing import FilteringBoundLogger

from streams.topics import Topics
from worker import settings as sources
from worker.errors import Unavailable, UsageError
from worker.logs import make_logger
from worker.processes.base import Options
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.kafka.engine import Engine

_NOISY = ("faust", "mode", "aiokafka")


def serve(settings: Settings, options: Options, log: FilteringBoundLogger) -> None:
    """`quartet run` on Kafka: from the broker to the last commit. Raises what ended it."""

    async def run() -> None:
        await _engine(settings, options, log).run()

    for name in _NOISY:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_ToLog(log)], False
    asyncio.run(run())


def application() -> Any:
    """The Faust application of the settings in the environment and in `quartet.toml`."""
    settings = sources.load()
    return _engine(settings, Options(), make_logger(settings.log_level)).app


def _engine(settings: Settings, options: Options, log: FilteringBoundLogger) -> Engine:
    """Raises `UsageError` for settings that Kafka has no use for, `Unavailable` without the extra."""
    if settings.broker is None:
        raise UsageError("no broker is named: set QUARTET_BROKER, or broker in quartet.toml, to kafka://HOST:PORT")
    if settings.bars or settings.inputs:
        raise UsageError("the settings bars and inputs are for Redis: on Kafka every bar comes by <namespace>.bars")
    if options.rebuild:
        raise UsageError(
            "--rebuild is for Redis: on Kafka delete the changelog topic and the group instead, as docs/kafka.md says"
        )
    try:
        Topics(settings.namespace)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        from worker.kafka.engine import Engine  # noqa: PLC0415  only with the extra
        from worker.sink import bootstrap_of  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("worker", "agents", "streams"):
            raise
        raise Unavailable(
            f"Kafka needs the module {error.name}: install it with `pip install 'quartet-worker[kafka]'`"
        ) from None
    return Engine(settings, bootstrap_of(settings.broker), options, log)


class _ToLog(logging.Handler):
    """What the libraries have to say, in our log: one line each, and a warning, for they go on by themselves."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.warning(" ".join(record.getMessage().split()), source=record.name)

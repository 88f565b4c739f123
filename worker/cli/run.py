"""`quartet run`: serve until SIGTERM."""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from worker.cli.options import Bars, reading, with_settings_and
from worker.settings import Settings


@with_settings_and("broker")
def run(
    settings: Settings,
    bars: Bars = None,
    until_idle: Annotated[
        float | None,
        typer.Option("--until-idle", metavar="SECONDS", min=0, help="Stop once the input was silent this long."),
    ] = None,
    accept_gap: Annotated[
        bool,
        typer.Option("--accept-gap", help="Go on past input that is gone now: count it as lost and warm up again."),
    ] = False,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="NAME", help="One stage only: features, agent:NAME or consensus."),
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="Every stage as a process of its own, started and watched by this one.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Compute the state anew from the retained input; emits nothing.")
    ] = False,
) -> None:
    """Serve: bars in, votes and signals out, until SIGTERM."""
    from worker.logs import make_logger
    from worker.service import Options
    from worker.serving import serve
    from worker.split import serve_split

    name = _stage(settings, stage)
    _check_split(settings, split, stage, rebuild)
    options = Options(until_idle_s=until_idle, accept_gap=accept_gap, rebuild=rebuild)

    def stop(_number: int, _frame: Any) -> None:
        options.stop.set()

    def reload(_number: int, _frame: Any) -> None:
        options.reload.set()

    signal.signal(signal.SIGHUP, reload)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log = make_logger(settings.log_level)
    if split:
        serve_split(reading(settings, bars), options, log)
        return
    serve(reading(settings, bars), options, log.bind(stage=name) if stage else log, name)


def _check_split(settings: Settings, split: bool, stage: str | None, rebuild: bool) -> None:
    from worker.errors import UsageError

    if split and stage is not None:
        raise UsageError(f"--split runs every stage and --stage {stage} only one: give one of the two")
    if split and settings.broker is not None:
        raise UsageError("--split is for Redis: on Kafka each partition runs the whole chain; add workers instead")
    if split and rebuild:
        raise UsageError("--rebuild is for one stage: stop the others, then `quartet run --stage NAME --rebuild`")


def _stage(settings: Settings, stage: str | None) -> str:
    """The stage to run; all of them chained where none is named."""
    from streams.keys import CHAIN
    from worker.assembly import stage_names
    from worker.errors import UsageError

    if stage is None:
        return CHAIN
    if stage not in stage_names(settings):
        raise UsageError(f"--stage {stage}: expected one of {', '.join(stage_names(settings))}")
    return stage

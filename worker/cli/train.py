"""`quartet train`: a file of bars becomes artifacts that load."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import with_settings
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.training.train import Progress, Trained

_PIPED_WIDTH = 140


@with_settings
def train(
    settings: Settings,
    bars: Annotated[Path, typer.Option(metavar="FILE", help="Bars to train on: .csv, .parquet or a recording.")],
    agent: Annotated[str, typer.Option(metavar="NAME", help="One agent, several joined by commas, or all.")] = "all",
    seed: Annotated[int, typer.Option(min=0, help="Makes a training repeatable.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train agents on a file of bars and write their artifacts, each proved to load."""
    from worker.training.bars import read_bars
    from worker.training.train import choose, train_agents

    chosen = choose([name.strip() for name in agent.split(",")])
    file = read_bars(bars)
    for count, what in ((file.repeated, "repeated"), (file.unclosed, "unclosed")):
        if count:
            _note(f"{bars}: {count} {what} bars left out")
    with _progress(chosen) as progress:
        trained = train_agents(
            file.bars,
            settings.models,
            agents=chosen,
            seed=seed,
            progress=progress,
            warmup_bars=settings.warmup_bars["v3"],
            max_gap_bars=settings.max_gap_bars,
            quality=settings.quality,
        )
    _print_json(trained) if as_json else _print_table(trained)
    for one in trained:
        for warning in one.warnings:
            _note(f"warning: {one.agent}: the running worker would mute such votes: {warning}")
        if one.validation.r2 <= 0:
            _note(f"warning: {one.agent}: R2 {one.validation.r2:.3f} on validation: no better than the mean return")


@contextmanager
def _progress(agents: tuple[str, ...]) -> Iterator[Progress]:
    """Bars on stderr, and only on a terminal; one for each agent."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        tasks = {agent: shown.add_task(agent, total=None, start=False) for agent in agents}

        def progress(agent: str, done: int, total: int) -> None:
            shown.start_task(tasks[agent])
            shown.update(tasks[agent], completed=done, total=total)

        yield progress


def _print_table(trained: list[Trained]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("agent", "file", box=None, pad_edge=False)
    for name in ("R2", "R2 test", "hit rate", "of votes", "HOLD", "threshold", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in trained:
        seen = one.validation
        table.add_row(
            one.agent,
            one.file.name,
            f"{seen.r2:.3f}",
            f"{one.test.r2:.3f}",
            f"{seen.hit_rate:.1%}",
            str(seen.acted),
            f"{seen.actions['HOLD']:.1%}",
            f"{one.threshold:.6f}",
            f"{one.seconds:.1f}",
        )
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    console.print(table)
    console.print(
        f"R2, hit rate and HOLD on validation. Written to {trained[0].file.parent}; each was loaded back.",
        soft_wrap=True,
        markup=False,
    )


def _print_json(trained: list[Trained]) -> None:
    import orjson

    print(orjson.dumps([_row(one) for one in trained], option=orjson.OPT_INDENT_2).decode())


def _row(one: Trained) -> dict[str, Any]:
    return {
        "agent": one.agent,
        "file": str(one.file),
        "threshold": one.threshold,
        "residual_std": one.residual_std,
        "hold_share_training": one.training_hold,
        "validation": one.validation.as_json(),
        "test": one.test.as_json(),
        "seconds": round(one.seconds, 3),
        "cpu_seconds": round(one.cpu_seconds, 3),
        "warnings": one.warnings,
    }


def _note(text: str) -> None:
    print(text, file=sys.stderr)

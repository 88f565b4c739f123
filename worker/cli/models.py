"""`quartet models`: what is in the models folder, would it vote, and is it as the manifest says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import with_settings
from worker.errors import CheckFailed
from worker.settings import Settings

if TYPE_CHECKING:
    from agents.artifacts import LoadOptions

app = typer.Typer(help="Look at the artifacts and steer the agents.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON list.")]


@app.command("list")
@with_settings
def list_models(settings: Settings, as_json: AsJson = False) -> None:
    """Load and probe every artifact, without a server, and say which would vote.

    Exit code 1 where a selected artifact is refused or the folder holds none.
    """
    from agents.artifacts import inspect

    rows = inspect(settings.models, _load_options(settings))
    if as_json:
        _print_json(rows)
    elif rows:
        _print_table(rows, ("agent", "file", "state", "reason", "features", "parameters", "outputs", "selected"))
    if not rows:
        raise CheckFailed(
            f"no artifacts in {settings.models}: put models there, or make some with "
            f"`quartet train --bars FILE --agent all --models {settings.models}`"
        )
    if any(row["selected"] and row["state"] == "refused" for row in rows):
        raise typer.Exit(1)


@app.command("import")
@with_settings
def import_models(
    settings: Settings,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of legacy artifacts.")],
    as_json: AsJson = False,
) -> None:
    """Convert the artifacts of DIR into --models: .ubj, .txt, .pth and scaler .json, each proved to give the same bits.

    Nothing is overwritten. Exit code 1 where an artifact is refused or DIR holds none.
    """
    from agents import importing

    results = importing.import_models(source, settings.models, _load_options(settings))
    rows = [asdict(result) for result in results]
    if as_json:
        _print_json(rows)
    elif rows:
        _print_table(rows, ("agent", "file", "state", "reason", "written"))
    if not rows:
        raise CheckFailed(f"no artifacts in {source}: nothing was imported; name the folder that holds them")
    if any(row["state"] == "refused" for row in rows):
        raise typer.Exit(1)


@app.command("verify")
@with_settings
def verify_models(settings: Settings, as_json: AsJson = False) -> None:
    """Compare every file with the manifest: missing, changed, unlisted. Exit code 1 where one differs."""
    from agents import manifest

    rows = [asdict(finding) for finding in manifest.verify(settings.models)]
    if as_json:
        _print_json(rows)
    elif rows:
        _print_table(rows, ("file", "problem"))
    else:
        typer.echo(f"{settings.models}: every file is as the manifest says")
    if rows:
        raise typer.Exit(1)


def _load_options(settings: Settings) -> LoadOptions:
    """How the worker would load; also sets the one torch thread with which it would compute."""
    from worker.assembly import load_options, use_one_thread_a_model

    use_one_thread_a_model()
    return load_options(settings)


def _print_json(rows: Sequence[Mapping[str, Any]]) -> None:
    import orjson

    typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())


def _print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """A table on a terminal, tab-separated lines elsewhere; below it each detail, whole."""
    cells = [[_cell(column, row[column]) for column in columns] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns)
        for line in cells:
            table.add_row(*line)
        Console().print(table, markup=False)
    else:
        for line in [list(columns), *cells]:
            typer.echo("\t".join(line))
    for row in rows:
        if row["detail"]:
            typer.echo(f"{Path(row['file']).name}: {row['detail']}")


def _cell(column: str, value: Any) -> str:
    if column == "file":
        return Path(value).name
    if column == "features":
        return str(len(value))
    if column == "selected":
        return "yes" if value else ""
    if isinstance(value, (list, tuple)):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)

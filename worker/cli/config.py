"""`quartet config`: what is set, and where."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from worker.cli.options import with_layers
from worker.settings import Layer, Settings, resolve

app = typer.Typer(no_args_is_help=True, help="Show and check the settings.")

Layers = tuple[Layer, ...]


@app.command()
@with_layers
def show(layers: Layers, as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Every setting in force and where it comes from; passwords are masked."""
    settings = resolve(layers)
    if as_json:
        typer.echo(json.dumps(settings.describe(), indent=2))
        return
    shown = {name: _text(value) for name, value in settings.describe().items()}
    width = max(map(len, shown))
    for name, value in shown.items():
        typer.echo(f"{name:<{width}}  {value}  ({_source(name, layers)})")


@app.command()
@with_layers
def check(layers: Layers) -> None:
    """Say whether the settings are valid; exit 2 and name the one that is not."""
    resolve(layers)
    places = ", ".join(name for name, values in layers if values)
    typer.echo(f"settings are valid ({places or 'all defaults'})")


def _source(name: str, layers: Layers) -> str:
    """The sources of one setting; a table may have several, the strongest first."""
    found = [place for place, values in layers if name in values]
    merged = Settings.model_fields[name].default_factory is not None
    return "default" if not found else ", ".join(found) if merged else found[0]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list):
        return ",".join(value) or "-"
    return "-" if value is None else str(value)

"""`quartet config`: what is set, and where."""

from __future__ import annotations

import json
from collections import Counter
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
    """One line of one setting; of a table of tables what most of them have, then what single ones have instead."""
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        return _tables(value)
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return ",".join(value) or "-"
    return "-" if value is None else str(value)


def _tables(tables: dict[str, dict[str, Any]]) -> str:
    names = dict.fromkeys(name for table in tables.values() for name in table)
    found = {
        name: Counter(table[name] for table in tables.values() if name in table).most_common(1)[0] for name in names
    }
    common = {name: value for name, (value, n) in found.items() if n > 1}
    others = {
        key: {name: value for name, value in table.items() if name not in common or value != common[name]}
        for key, table in tables.items()
    }
    return "; ".join(
        [*([_text(common)] if common else []), *(f"{key}: {_text(own)}" for key, own in others.items() if own)]
    )

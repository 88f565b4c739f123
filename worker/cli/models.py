"""`quartet models`: what is in the models folder, would it vote, and is it as the manifest says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import with_settings, with_settings_and
from worker.errors import CheckFailed
from worker.settings import Settings

if TYPE_CHECKING:
    from agents.artifacts import LoadOptions
    from worker.control import Order

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


Agent = Annotated[str, typer.Argument(metavar="AGENT", help="xgboost, lightgbm, nhits or patchtst.")]
ModelFile = Annotated[Path, typer.Argument(metavar="FILE", help="The model file; its scaler lies beside it.")]
Wait = Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0, help="Wait this long for the answer.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Give the order and do not wait.")]
OneEvent = Annotated[bool, typer.Option("--json", help="One JSON list of the events that answer.")]
WAIT_S = 15.0


@app.command("reload")
@with_settings_and("broker")
def reload_models(
    settings: Settings,
    agent: Annotated[str, typer.Argument(metavar="[AGENT]", help="One agent; every one that is not pinned.")] = "",
    wait: Wait = WAIT_S,
    no_wait: NoWait = False,
    as_json: OneEvent = False,
) -> None:
    """Load the newest artifact beside the running one and swap it in between two bars; kept as it is on any failure."""
    _order(settings, "reload", agent, None, 0 if no_wait else wait, as_json=as_json)


TRIALS = {
    "canary": "Put a new version beside the running one, with a tenth of the weight; any violation rolls it back.",
    "shadow": "Put a new version beside the running one, with weight 0.",
}
STEPS = {
    "promote": "Give the agent's seat to its canary or shadow; refused unless the gate passes with 200 votes.",
    "rollback": "Take the canary or shadow away or, where there is none, serve again what served before.",
    "mute": "Take the agent's weight away until it is unmuted; its votes are still written.",
    "unmute": "Let a muted agent vote again, from an empty window.",
}


def _add_trial(order: str, text: str) -> None:
    """`quartet models ORDER AGENT FILE`."""

    @app.command(order, help=text)
    @with_settings_and("broker")
    def give(
        settings: Settings,
        agent: Agent,
        file: ModelFile,
        wait: Wait = WAIT_S,
        no_wait: NoWait = False,
        as_json: OneEvent = False,
    ) -> None:
        _order(settings, order, agent, file, 0 if no_wait else wait, as_json=as_json)


def _add_step(order: str, text: str) -> None:
    """`quartet models ORDER AGENT`."""

    @app.command(order, help=text)
    @with_settings_and("broker")
    def give(
        settings: Settings, agent: Agent, wait: Wait = WAIT_S, no_wait: NoWait = False, as_json: OneEvent = False
    ) -> None:
        _order(settings, order, agent, None, 0 if no_wait else wait, as_json=as_json)


for _name, _text in TRIALS.items():
    _add_trial(_name, _text)
for _name, _text in STEPS.items():
    _add_step(_name, _text)


def _order(settings: Settings, order: str, agent: str, file: Path | None, wait_s: float, *, as_json: bool) -> None:
    """Give one order and say what became of it: exit code 0 done, 1 refused, 3 where an answer is missing."""
    from worker import ordering
    from worker.errors import Unavailable, UsageError

    if agent not in settings.agents and (agent or order != "reload"):
        raise UsageError(f"agent {agent!r} is not configured; the agents are {', '.join(settings.agents)}")
    given = ordering.order_for(order, agent, file, settings.models)
    order_id, events, silent = _give(settings, given, wait_s)
    if wait_s and not events:
        raise Unavailable(
            f"no worker of namespace {settings.namespace} answered order {order_id} within {wait_s:g} s; it is kept "
            "and carried out when one runs: see `quartet run`, and the stream of events"
        )
    if as_json:
        _print_json(events)
    elif not wait_s:
        typer.echo(f"ordered: {order} {agent} ({order_id})")
    for event in [] if as_json else events:
        where = f"partition {event['partition']}:" if "partition" in event else ""
        typer.echo(" ".join(part for part in (where, event["kind"], event["agent"], event["reason"]) if part))
        typer.echo(f"  {event['detail']}")
    if wait_s and silent:
        raise Unavailable(
            f"partitions {', '.join(map(str, silent))} of namespace {settings.namespace} did not answer order "
            f"{order_id} within {wait_s:g} s, the others did; it is kept there and carried out by whoever serves "
            "them: see the topic of events"
        )
    if any(event["kind"] in ordering.REFUSALS for event in events):
        raise typer.Exit(1)


def _give(settings: Settings, order: Order, wait_s: float) -> tuple[str, list[dict[str, Any]], list[int]]:
    """Write the order where the workers read it; its ID, the events that answered it, and the partitions without."""
    if settings.broker is not None:
        from worker.kafka import orders

        written = orders.give(settings.broker, settings.namespace, order, wait_s)
        return written.shown, written.events, written.silent
    from streams.keys import Keys
    from worker import ordering
    from worker.assembly import open_client, server_url

    keys = Keys(settings.namespace)
    with server_url(settings, start=False) as url, open_client(url) as client:
        order_id, after = ordering.give(client, keys, order)
        each = ordering.answering(client, keys, order, settings.agents)
        return order_id, ordering.answers(client, keys, order_id, after, wait_s, each) if wait_s else [], []


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

"""`quartet explain`: one signal and everything behind it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.options import Bars, reading, with_settings
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.explain import Explanation

_PIPED_WIDTH = 140


@with_settings
def explain(
    settings: Settings,
    bar_id: Annotated[
        str | None, typer.Argument(metavar="BAR_ID", help="A bar as <symbol>|<interval>|<ts>, in quotes.")
    ] = None,
    last: Annotated[bool, typer.Option("--last", help="The newest signal.")] = False,
    bars: Bars = None,
    recording: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Look into a recording instead of the server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show one signal: its votes and weights, who was left out and why, and the same recomputed.

    Exits 1 where something that was recomputed differs.
    """
    from worker.errors import UsageError

    if (bar_id is None) != last:
        raise UsageError("give one of BAR_ID and --last")
    from streams.inputs import Inputs
    from streams.keys import Keys
    from streams.redis import find_keys
    from worker.assembly import open_client, server_url, use_one_thread_a_model

    use_one_thread_a_model()
    from worker.explain import RecordedPlace, ServerPlace
    from worker.explain import explain as explained
    from worker.record import inputs_to_read

    settings = reading(settings, bars)
    if recording is not None:
        found = explained(RecordedPlace(recording), settings, bar_id)
    else:
        with server_url(settings, start=False) as url:
            client = open_client(url)
            inputs = Inputs(inputs_to_read(client, settings, _note), settings.namespace)
            inputs.refresh(partial(find_keys, client))
            found = explained(ServerPlace(client, Keys(settings.namespace), inputs.keys), settings, bar_id)
    _print(found, as_json=as_json)
    if not found.same:
        raise typer.Exit(1)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(found: Explanation, *, as_json: bool) -> None:
    import orjson
    from rich.console import Console
    from rich.table import Table

    from worker.explain import MEANINGS, agents_in_order

    if as_json:
        print(orjson.dumps(found.as_json(), option=orjson.OPT_INDENT_2).decode())
        return
    signal, console = found.signal, Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    console.print(
        f"{signal['bar_id']}: {signal['action']} ({signal['status']}: {MEANINGS[signal['status']]}), "
        f"confidence {signal['confidence']:.4f}",
        soft_wrap=True,
    )
    console.print(
        f"{signal['configured']} configured, {signal['loaded']} loaded, {signal['eligible']} eligible, "
        f"{signal['voting']} voting, {signal['agreeing']} agreeing, quorum {signal['quorum']}",
        soft_wrap=True,
    )
    table = Table("agent", "action", box=None, pad_edge=False)
    for name in ("confidence", "weight", "effective"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "version"):
        table.add_column(name, no_wrap=True)
    for agent in agents_in_order(signal["votes"]):
        vote = signal["votes"][agent]
        numbers = (f"{vote['confidence']:.4f}", f"{vote['weight']:.3f}", f"{vote['effective_weight']:.3f}")
        table.add_row(agent, vote["action"], *numbers, vote["state"], vote["version"] or "")
    console.print(table)
    for agent, why in found.left_out.items():
        console.print(f"left out: {agent}: {why}", soft_wrap=True, markup=False)
    words = {True: "the same", False: "DIFFERENT", None: "-"}
    for check in found.checks:
        console.print(f"recomputed: {check.what}: {words[check.same]}: {check.detail}", soft_wrap=True, markup=False)

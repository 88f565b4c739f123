"""`quartet demo`: four models, a market, a worker, and the numbers, in one command."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import with_settings
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.demo.play import Stage
    from worker.demo.show import Outcome

PIPED_WIDTH = 100


@with_settings
def demo(
    settings: Settings,
    symbols: Annotated[int, typer.Option(min=1, max=50, help="Symbols of the synthetic market.")] = 20,
    bars: Annotated[int, typer.Option(min=200, max=4_000, help="One-minute bars of each symbol.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another market, with models of its own.")] = 0,
    keep: Annotated[bool, typer.Option("--keep", help="Go on with new bars until Ctrl-C.")] = False,
    sabotage: Annotated[
        bool, typer.Option("--sabotage", help="With one artifact to refuse, and one model that collapses in mid-run.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON; all else goes to stderr.")
    ] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Write the last screen as a picture.")
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            "--models", metavar="DIR", help="Models to use; missing ones are trained there. [state directory]"
        ),
    ] = None,
    redis: Annotated[
        str, typer.Option("--redis", metavar="embedded", help="The demo's server is always one of its own.")
    ] = "embedded",
) -> None:
    """See it work: a synthetic market on a real server, four models, and what they say. Touches nothing of yours."""
    from rich.console import Console

    from streams.keys import Keys
    from worker.demo import sabotage as harm
    from worker.demo.play import Stage, play
    from worker.demo.scene import Scene
    from worker.errors import CheckFailed, UsageError
    from worker.settings import EMBEDDED, mask
    from worker.training.market import NOTE

    if redis != EMBEDDED:
        raise UsageError(
            f"--redis {mask(redis)}: the demo brings a server of its own and touches no other; leave --redis out, "
            "or serve from yours with `quartet run --redis URL`"
        )
    _end_as_after_ctrl_c()
    console = Console(stderr=as_json, width=None if (sys.stderr if as_json else sys.stdout).isatty() else PIPED_WIDTH)
    directory = settings.state_dir / "demo"
    scene = Scene(directory, models or directory / "models" / f"seed-{seed}", symbols, bars, seed, keep, sabotage)
    if sabotage:
        harm.check(scene)
    stage = Stage(scene, Keys(settings.namespace), console)

    def tell(outcome: Outcome) -> None:
        _tell(stage, outcome, as_json=as_json, svg=svg)

    stage.say(f"quartet demo: {symbols} symbols x {bars} one-minute bars, four models.")
    stage.say(NOTE[:1].upper() + NOTE[1:] + ".")
    outcome = play(stage, settings.http_port, after=tell)
    if outcome.differences:
        raise CheckFailed("streams and metrics differ: " + "; ".join(outcome.differences))
    if outcome.story is not None and outcome.story.missing:
        raise CheckFailed("the sabotage went unseen: " + "; ".join(outcome.story.missing))


def _tell(stage: Stage, outcome: Outcome, *, as_json: bool, svg: Path | None) -> None:
    """The summary, as it was asked for."""
    import orjson

    from worker.demo import show

    if as_json:
        print(orjson.dumps(outcome.as_json(), option=orjson.OPT_INDENT_2).decode(), flush=True)
    else:
        stage.console.print()
        stage.console.print(show.summary(outcome), highlight=False)
        stage.console.print()
        for line in show.next_steps(outcome):
            stage.say(line, wrap=False)
    if svg is not None:
        show.picture(outcome, svg)
        stage.say(f"Picture: {svg}")


def _end_as_after_ctrl_c() -> None:
    """A closed terminal or SIGTERM ends the demo as Ctrl-C does: children first."""

    def end(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)

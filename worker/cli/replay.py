"""`quartet replay`: a file of bars onto a stream, or a recording computed again and compared."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import with_settings
from worker.settings import Settings

if TYPE_CHECKING:
    from rich.progress import Progress

    from worker.replay.verify import Verdict


@with_settings
def replay(
    settings: Settings,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A recording, or bars in .csv or .parquet.")],
    speed: Annotated[
        str, typer.Option(metavar="max|1|10", help="Times the bars' own clock; max waits for nothing.")
    ] = "max",
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute the recording again in memory and compare; publishes nothing.")
    ] = False,
    bars_key: Annotated[
        str | None,
        typer.Option("--bars-key", metavar="KEY", help="The stream to publish to; the namespace's own bars."),
    ] = None,
    maxlen: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Entries that the stream keeps, roughly; all unless given.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", min=1, help="Bars a batch of --verify.", hidden=True)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Publish bars into a stream with their own times, or verify a recording.

    --verify computes features, votes and signals again from the recorded bars, with the models of the recorded votes,
    and exits 1 where anything differs or a model is not at hand.
    """
    from streams.recording import RecordingError
    from worker.errors import UsageError

    if file.is_dir():
        raise UsageError(f"{file} is a directory; give one file: the first of a recording, or bars in .csv or .parquet")
    try:
        if verify:
            _verify(settings, file, batch_size, as_json=as_json)
        else:
            _publish(settings, file, speed, bars_key, maxlen, as_json=as_json)
    except RecordingError as error:
        raise UsageError(str(error)) from error


# ------------------------------------------------------------------ publishing


def _publish(
    settings: Settings, file: Path, speed: str, bars_key: str | None, maxlen: int | None, *, as_json: bool
) -> None:
    import orjson

    from streams.keys import Keys
    from worker.assembly import open_client, server_url
    from worker.errors import UsageError
    from worker.replay.publish import Pace, contents_of, publish, read_entries, read_speed

    pace = Pace(read_speed(speed), maxlen)
    total, inputs = contents_of(file)
    if bars_key is None and len(inputs) > 1:
        raise UsageError(
            f"{file} holds bars of {len(inputs)} keys ({', '.join(inputs[:3])}); name the one stream that all of them "
            "go to with --bars-key"
        )
    key = bars_key or Keys(settings.namespace).bars

    def stop(_number: int, _frame: Any) -> None:
        pace.stop.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with server_url(settings, start=True) as url, _progress() as shown:
        task = shown.add_task("bars", total=total)
        client = open_client(url)
        done = publish(client, key, read_entries(file), pace, lambda n: shown.advance(task, n))
    if as_json:
        print(orjson.dumps({"published": done, "key": key, "complete": not pace.stop.is_set()}).decode())
    else:
        print(f"{done} bars of {file} published to {key}" + ("; stopped" if pace.stop.is_set() else ""))


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on stderr, and only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        yield shown


# ------------------------------------------------------------------ verifying


def _verify(settings: Settings, file: Path, batch_size: int | None, *, as_json: bool) -> None:
    import orjson

    from worker.assembly import use_one_thread_a_model

    use_one_thread_a_model()
    from worker.replay.verify import verify

    with _progress() as shown:
        task = shown.add_task("reading", total=None)
        verdict = verify(
            file,
            settings,
            batch_size=batch_size,
            progress=lambda n: shown.advance(task, n),
            total=lambda n: shown.update(task, description="verifying", total=n),
        )
    if as_json:
        print(orjson.dumps(verdict.as_json(), option=orjson.OPT_INDENT_2).decode())
    else:
        _print_verdict(file, verdict)
    if not verdict.ok:
        raise typer.Exit(1)


def _print_verdict(file: Path, verdict: Verdict) -> None:
    found = verdict.comparison
    counts = ", ".join(f"{n} of {stream}" for stream, n in found.compared.items())
    print(f"{file}: {verdict.bars} bars computed again; compared: {counts or 'nothing'}.")
    for line in (*verdict.notes, *_build_lines(verdict), *_loose_ends(verdict)):
        print(line)
    if found.first is not None:
        print(f"DIFFERENT: {found.differences} values in {sum(found.differing.values())} entries. First:")
        print(f"  {found.first.stream}: {found.first.line()}")
        for stream, one in found.firsts.items():
            if one is not found.first:
                print(f"  {stream}: {one.line()}")
    for (agent, version), why in verdict.missing.items():
        print(f"MISSING MODEL: {agent} {version}: {why}; its votes were taken over as recorded.")
    names = ", ".join(f"{agent} {version}" for agent, version in verdict.missing)
    if verdict.ok:
        print("VERIFIED: features, votes and signals are the same" + (", to the bit." if not found.tolerance else "."))
    elif verdict.empty:
        print(
            "NOT VERIFIED: nothing was compared: no output of the recorded bars is in the file; record a worker's work."
        )
    elif verdict.same:
        print(f"VERIFIED ALL BUT the models that are not at hand: {names}.")


def _build_lines(verdict: Verdict) -> list[str]:
    if not verdict.other_build:
        return []
    return [
        f"Recorded with another build, so equal means within {verdict.comparison.tolerance:g}: "
        + "; ".join(verdict.other_build)
    ]


def _loose_ends(verdict: Verdict) -> list[str]:
    lines = []
    if ahead := max(verdict.comparison.unrecorded.values(), default=0):
        lines.append(f"The recording ends before the outputs of its last {ahead} bars, which are not compared.")
    if verdict.leftover:
        left = ", ".join(f"{n} of {stream}" for stream, n in verdict.leftover.items())
        lines.append(f"DIFFERENT: recorded, but not computed again: {left}.")
    return lines

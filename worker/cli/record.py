"""`quartet record`: every stream of the namespace into one file."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import Bars, reading, with_settings
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.record import Recording


@with_settings
def record(
    settings: Settings,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recording: a new one, or one to continue.")],
    bars: Bars = None,
    from_now: Annotated[
        bool, typer.Option("--from-now", help="Leave out what the streams hold already; such a file is not verified.")
    ] = False,
    rotate_mib: Annotated[
        int, typer.Option(min=0, metavar="MIB", help="Size after which the next part begins; 0 for one file.")
    ] = 1024,
    until_idle: Annotated[
        float | None,
        typer.Option("--until-idle", metavar="SECONDS", min=0, help="Stop once all streams were silent this long."),
    ] = None,
    to_parquet: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the streams of the recording FILE there as Parquet, and end."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Write bars, features, votes, signals and events into one file, until Ctrl-C. Reads only.

    The file is JSON Lines under zstd: `zstdcat FILE | jq`. Killing the recorder loses at most the last second; the same
    command goes on where it was.
    """
    from worker.errors import UsageError

    if to_parquet is not None:
        _convert(out, to_parquet, as_json=as_json)
        return
    from streams.inputs import Inputs
    from streams.keys import Keys
    from streams.recording import MIB
    from worker.assembly import open_client, server_url
    from worker.record import Plan, Recorder, inputs_to_read

    if out.is_dir():
        raise UsageError(f"--out {out} is a directory; give a file such as {out / 'day.jsonl.zst'}")
    settings = reading(settings, bars)
    ended = threading.Event()

    def stop(_number: int, _frame: Any) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with server_url(settings, start=False) as url:
        client = open_client(url)
        plan = Plan(
            out,
            Keys(settings.namespace),
            Inputs(inputs_to_read(client, settings, _note), settings.namespace),
            from_now=from_now,
            rotate_bytes=rotate_mib * MIB or None,
            until_idle_s=until_idle,
            stop=ended,
        )
        recorder = Recorder(client, plan, _note)
        _note(f"recording namespace {settings.namespace} to {out}; Ctrl-C ends it")
        _tell(recorder.run(), as_json=as_json)


def _convert(file: Path, directory: Path, *, as_json: bool) -> None:
    import orjson

    from worker.replay.parquet import write_parquet

    written = write_parquet(file, directory)
    if as_json:
        print(orjson.dumps({str(path): rows for path, rows in written.items()}, option=orjson.OPT_INDENT_2).decode())
        return
    for path, rows in written.items():
        print(f"{path}: {rows} rows")


def _tell(done: Recording, *, as_json: bool) -> None:
    import orjson

    if as_json:
        found = {"file": str(done.path), "entries": done.entries, "lost": done.lost}
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
        return
    counts = ", ".join(f"{n} {stream}" for stream, n in sorted(done.entries.items()))
    print(f"{done.path}: {counts or 'no entries'}" + (f"; {done.lost} were trimmed before" if done.lost else ""))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""A recording as Parquet files, one a kind of stream, for whoever works with columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from streams.recording import Recorded, Recording, RecordingError, read_header
from worker.errors import Unavailable, UsageError
from worker.replay.accepted import accepted_bars

_NESTED = ("values", "contracts", "votes", "evidence")
"""Fields that are objects: `values` become columns, the others are kept as JSON text."""


def write_parquet(recording: Path, directory: Path) -> dict[Path, int]:
    """Write `bars features votes signals events rejected` of a recording; each file and its rows.

    `bars.parquet` holds the accepted bars in the columns that `quartet train` reads. Raises `UsageError`.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise Unavailable("Parquet needs the extra: pip install 'quartet-worker[parquet]'") from error
    try:
        read_header(recording)
        directory.mkdir(parents=True, exist_ok=True)
    except RecordingError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"--to-parquet {directory}: {error.strerror}; give a directory, new or old") from error
    written: dict[Path, int] = {}

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            names = list(dict.fromkeys(name for row in rows for name in row))
            path = directory / f"{name}.parquet"
            pq.write_table(pa.table({n: [row.get(n) for row in rows] for n in names}), path)
            written[path] = len(rows)

    try:
        write("bars", [_bar_row(bar) for bar in accepted_bars(recording)])
        for name, wanted, row in _KINDS:
            write(name, list(_rows(recording, wanted, row)))
    except RecordingError as error:
        raise UsageError(str(error)) from error
    return written


def _rows(
    recording: Path, wanted: Callable[[str], bool], row: Callable[[Recorded], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    for item in Recording(recording):
        if isinstance(item, Recorded) and wanted(item.stream):
            yield {"id": item.id, **row(item)}


def _bar_row(bar: Any) -> dict[str, Any]:
    return {name: getattr(bar, name) for name in ("symbol", "ts", "interval", "open", "high", "low", "close", "volume")}


def _json_row(item: Recorded) -> dict[str, Any]:
    data: Mapping[str, Any] = orjson.loads(item.fields[b"data"])
    flat = {name: value for name, value in data.items() if name not in _NESTED}
    objects = {n: orjson.dumps(data[n]).decode() for n in _NESTED if n in data and n != "values"}
    return {**flat, **(data.get("values") or {}), **objects}


def _flat_row(item: Recorded) -> dict[str, Any]:
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in item.fields.items()}


_KINDS: tuple[tuple[str, Callable[[str], bool], Callable[[Recorded], dict[str, Any]]], ...] = (
    ("features", lambda stream: stream == "features", _json_row),
    ("votes", lambda stream: stream.startswith("votes:"), _json_row),
    ("signals", lambda stream: stream == "signals", _json_row),
    ("events", lambda stream: stream == "events", _json_row),
    ("rejected", lambda stream: stream == "rejected", _flat_row),
)

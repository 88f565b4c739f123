"""Bars are published again: byte for byte from a recording, in the order of the closes from other files."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from streams.messages import Entry
from streams.recording import Lost, Recorded, Recording, Writer, encode
from streams.redis import connect
from streams.validation import Limits
from tests.formats.samples import golden
from tests.helpers import quartet
from tests.replay.scene import Scene
from worker.errors import UsageError
from worker.intake import Intake
from worker.replay.parquet import write_parquet
from worker.replay.publish import Pace, Timed, contents_of, publish, read_entries, read_speed
from worker.settings import Settings
from worker.testing import Quartet
from worker.training.bars import read_bars

Day = tuple[Scene, Path]


def test_a_recording_is_published_byte_for_byte(day: Day, valkey: str, namespace: str) -> None:
    _, file = day
    told = json.loads(day[0].quartet("replay", file, "--bars-key", f"{namespace}:again", "--json"))
    recorded = [dict(i.fields) for i in Recording(file) if isinstance(i, Recorded) and i.stream == "bars"]
    with connect(valkey) as client:
        published = [fields for _, fields in client.xrange(f"{namespace}:again")]
    assert told["published"] == len(recorded)
    assert published == recorded


def test_a_recording_of_several_keys_is_not_mixed_into_one_unasked(tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl.zst"
    Writer.begin(file, {"id": "x", "part": 1, "namespace": "q", "inputs": ["a", "b"], "positions": {}}).close()
    done = quartet("replay", file, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "bars of 2 keys (a, b); name the one stream that all of them go to with --bars-key" in done.stderr


def test_keys_that_a_pattern_found_later_count_too(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl.zst"
    with Writer(file) as writer:
        writer.header({"id": "x", "part": 1, "namespace": "q", "inputs": ["candles-a"], "positions": {}})
        for number, key in enumerate(("candles-a", "candles-b", "candles-a")):
            writer.add(Recorded("bars", key, f"{number}-1", {b"symbol": b"A"}))
            writer.add(Recorded("signals", "q:signals", f"{number}-1", {b"data": b"{}"}))
    assert contents_of(file)[1] == ["candles-a", "candles-b"]
    done = quartet("replay", file, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "bars of 2 keys (candles-a, candles-b); name the one stream" in done.stderr


@pytest.mark.parametrize("end", [" ", "\r"])
def test_a_key_counts_as_well_on_a_line_that_another_program_wrote(tmp_path: Path, end: str) -> None:
    file = tmp_path / "foreign.jsonl.zst"
    with Writer(file) as writer:
        writer.header({"id": "x", "part": 1, "namespace": "q", "inputs": ["candles-a"], "positions": {}})
        writer._put(encode(Recorded("bars", "candles-b", "1-1", {b"symbol": b"A"})) + end.encode())
        writer._put(encode(Lost("signals", "q:signals", "1-1", 3)))
    assert contents_of(file)[1] == ["candles-a", "candles-b"]


def test_training_reads_the_accepted_bars_of_a_recording_and_its_parquet(day: Day, tmp_path: Path) -> None:
    """780 bars were fed: 3 refused, 1 replaced by a repetition, 3 left out."""
    _, file = day
    own = read_bars(file).bars
    written = write_parquet(file, tmp_path)
    assert {path.name for path in written} == {
        "bars.parquet", "features.parquet", "votes.parquet", "signals.parquet", "events.parquet", "rejected.parquet",
    }  # fmt: skip
    parquet = read_bars(tmp_path / "bars.parquet").bars
    assert len(own) == 773
    assert (own.ohlcv == parquet.ohlcv).all()
    assert (own.ts == parquet.ts).all()
    assert written[tmp_path / "votes.parquet"] == 4 * written[tmp_path / "signals.parquet"]


def test_csv_is_published_in_the_order_of_the_closes(tmp_path: Path) -> None:
    """An hour opens before its minutes and closes with the last of them."""
    file = tmp_path / "bars.csv"
    hour = 1_750_003_200_000
    rows = [f"A,{hour},1h,1,2,1,2,5", *(f"A,{hour + n * 60_000},1m,1,2,1,2,5" for n in (59, 0, 60))]
    file.write_text("symbol,ts,interval,open,high,low,close,volume\n" + "\n".join(rows) + "\n")
    found = [(entry.fields["interval"], (int(entry.fields["ts"]) - hour) // 60_000) for entry in read_entries(file)]
    assert found == [("1m", 0), ("1h", 0), ("1m", 59), ("1m", 60)]


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Stop(threading.Event):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def wait(self, timeout: float | None = None) -> bool:
        self._clock.now += timeout or 0.0
        return self.is_set()


class Taken:
    """A client that notes when each entry came."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.at: list[float] = []

    def pipeline(self, **_: Any) -> Any:
        return self

    def xadd(self, *_: Any, **__: Any) -> None:
        self.at.append(self.clock())

    def execute(self) -> None:
        """Nothing is held back."""


@pytest.mark.parametrize(("speed", "expected"), [(1.0, [0, 60, 60, 180]), (10.0, [0, 6, 6, 18])])
def test_the_pace_is_that_of_the_closes(speed: float, expected: list[int]) -> None:
    clock = Clock()
    entries = [Timed(ms, {}) for ms in (60_000, 120_000, None, 240_000)]
    taken = Taken(clock)
    assert publish(taken, "k", entries, Pace(speed, stop=Stop(clock)), lambda _: None, clock) == 4
    assert taken.at == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cryptofeed-2.4.1", "nautilus-1.221-json"])
def test_bars_of_other_programs_keep_the_pace_of_their_closes_too(name: str, tmp_path: Path) -> None:
    """And in memory the clock follows them, so that none is of the future."""
    file = tmp_path / "other.jsonl.zst"
    with Writer(file) as writer:
        writer.header({"id": "x", "part": 1, "namespace": "q", "inputs": [], "positions": {}})
        for entry in golden(name):
            writer.add(Recorded("bars", entry.key, entry.id, entry.fields))
    closes = [timed.closes_ms for timed in read_entries(file)]
    known = [ms for ms in closes if ms is not None]
    assert len(set(known)) > 1
    clock = Clock()
    taken = Taken(clock)
    publish(taken, "k", read_entries(file), Pace(1.0, stop=Stop(clock)), lambda _: None, clock)
    assert max(taken.at) == pytest.approx((max(known) - known[0]) / 1000)
    made = Quartet(Settings()).add(file)
    entries = [Entry(made.keys.bars, i, fields) for i, fields in made.streams.after(made.keys.bars, "0-0")]
    accepted = Intake(Limits()).accept(entries, made.streams.now_ms)
    assert accepted.bars
    assert "future" not in {reject.reason for reject in accepted.rejects}


def test_a_speed_is_max_or_a_number_above_0() -> None:
    assert read_speed("max") is None
    assert read_speed("10") == 10.0
    for wrong in ("0", "-1", "fast", "inf", "nan"):
        with pytest.raises(UsageError, match="expected max, or a number above 0"):
            read_speed(wrong)

"""The accepted bars of a recording: what the worker took in, by the rules and the outcomes of then."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from streams.formats import FormatReader
from streams.messages import Bar, Entry
from streams.recording import Recorded, Recording
from streams.validation import LATEST_TS_MS, Limits
from worker.assembly import limits_of, rules_of
from worker.intake import Intake
from worker.replay.outline import read_outline
from worker.settings import Settings

_BATCH = 1_000


def accepted_bars(path: Path) -> Iterator[Bar]:
    """The bars of a recording, in order: rejected, repeated and unclosed ones are left out.

    Raises `RecordingError` where the file is damaged.
    """
    recording = Recording(path)
    outline = read_outline(recording)
    settings = _settings(outline.starts[0].evidence["settings"]) if outline.starts else None
    limits = Limits() if settings is None else limits_of(settings)
    intake = Intake(limits, reader=None if settings is None else FormatReader(rules_of(settings)))
    inputs = (item for item in Recording(path) if isinstance(item, Recorded) and item.stream == "bars")
    while some := list(islice(inputs, _BATCH)):
        entries = [Entry(item.key, item.id, item.fields) for item in some]
        yield from intake.accept(entries, LATEST_TS_MS, frozenset(outline.left_out)).bars


def _settings(recorded: dict[str, Any]) -> Settings:
    return Settings(**{name: value for name, value in recorded.items() if name in Settings.model_fields})

"""Entry to bars: recognise the format, convert, and hold back what is not known to be closed.

A row that says nothing of its own end is closed when the next one has begun. So one row a series is
held until then; it is part of the committed state, and a replay of the same entries holds the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from streams.codec import seal, unseal
from streams.formats import binance, ccxt, cryptofeed, native, nautilus
from streams.formats.document import Document, read_document, read_plain
from streams.formats.times import whole
from streams.messages import Entry
from streams.validation import (
    DEFAULT_INTERVAL,
    EARLIEST_TS_MS,
    LATEST_TS_MS,
    BadBarError,
    Raw,
    interval_ms,
    missing_bars,
)

Closing = Literal["flag", "next", "always"]
HELD = b"held:"
MAX_HELD = 10_000


class Format(Protocol):
    """One foreign format. `read` gives one `Raw` a bar, and nothing for a message that is no bar."""

    NAME: str
    SHAPE: str

    @staticmethod
    def recognises(document: Document) -> bool: ...

    @staticmethod
    def read(document: Document) -> list[Raw]: ...


FORMATS: tuple[Any, ...] = (cryptofeed, native, binance, binance.Table, ccxt)
"""Tried in this order, after `nautilus`, which is known from the fields alone and need not be text."""

TABLES = (ccxt.NAME, binance.Table.NAME)
"""Formats of bare rows, which never say that they are closed."""


@dataclass(frozen=True, slots=True)
class InputRule:
    """What the entries of some keys do not say themselves. `pattern` is a glob over keys.

    `closed`: `flag` as the entry says, `always` every bar is closed, `next` a bar is closed when the
    next has begun; None is `next` for bare rows and `flag` otherwise. `prefix` goes before the symbol.
    """

    pattern: str = "*"
    symbol: str | None = None
    interval: str | None = None
    closed: Closing | None = None
    prefix: str = ""


NO_RULE = InputRule()


def recognise(entry: Entry) -> tuple[str, list[Raw]]:
    """The format's name and the bars in `entry` as it says them; none where it holds another message.

    Raises `BadBarError` for an entry that cannot be read or fits no format.
    """
    if nautilus.recognises(entry.fields) and (nautilus.owns(entry.fields) or not _fits_another(entry)):
        return nautilus.NAME, nautilus.read(entry.fields)
    document = read_document(entry.fields)
    known = _format_of(document)
    if known is not None:
        return known.NAME, known.read(document)
    tried = "; ".join(f"{known.NAME} ({known.SHAPE})" for known in (*FORMATS, nautilus))
    is_object = isinstance(document.value, Mapping)
    found = f"the fields {', '.join(map(str, document.value))[:80]}" if is_object else "a JSON list"
    reason = "missing_field" if is_object else "type"
    raise BadBarError(reason, f"fits no format, found {found}; tried {tried}")


def _format_of(document: Document) -> Any:
    return next((known for known in FORMATS if known.recognises(document)), None)


def _fits_another(entry: Entry) -> bool:
    try:
        return _format_of(read_document(entry.fields)) is not None
    except BadBarError:
        return False


class FormatReader:
    """Reads entries of any known format; `changes` and `restore` carry what it holds through a commit.

    The first of `rules` whose pattern fits an entry's key applies to it.
    """

    def __init__(self, rules: Sequence[InputRule] = ()) -> None:
        self._rules = tuple(rules)
        self._by_key: dict[str, InputRule] = {}
        self._held: dict[str, Raw | None] = {}
        self._changed: set[str] = set()

    def __call__(self, entry: Entry) -> list[Raw]:
        """The bars of one entry; empty where it is another program's message and no bar at all.

        One `Raw` comes out for each row that went in: the bar that a row closed, or the row itself
        with `closed` False. Raises `BadBarError`.
        """
        rule = self._rule(entry.key)
        if rule is NO_RULE and (raw := read_plain(entry.fields)) is not None:
            return [raw]
        name, raws = recognise(entry)
        if rule is not NO_RULE or name in TABLES:
            raws = [_completed(raw, rule, name) for raw in raws]
        closing = rule.closed or ("next" if name in TABLES else "flag")
        if closing == "always":
            return [{**raw, "closed": True} for raw in raws]
        return self._closed_by_next(entry, raws) if closing == "next" else raws

    def _rule(self, key: str) -> InputRule:
        rule = self._by_key.get(key)
        if rule is None:
            rule = next((r for r in self._rules if fnmatchcase(key, r.pattern)), NO_RULE)
            self._by_key[key] = rule
        return rule

    def _closed_by_next(self, entry: Entry, raws: Sequence[Raw]) -> list[Raw]:
        """Of a rolling window, the rows before the last closed one were passed on already: left out."""
        rows = [_placed(raw) for raw in raws]
        before = [raw for raw in rows if self._is_before(entry, raw)]
        return [{**raw, "closed": True} for raw in before[-1:]] + [
            self._settle(entry, raw, rows) for raw in rows if not self._is_before(entry, raw)
        ]

    def _is_before(self, entry: Entry, raw: Raw) -> bool:
        held = self._held.get(_series(entry, raw))
        return held is not None and raw["ts"] < held["ts"]

    def _settle(self, entry: Entry, raw: Raw, rows: Sequence[Raw]) -> Raw:
        """Hold `raw`, one of the entry's `rows`, and give the row that it closed, if it begins the next bar.

        A row further on closes only what stands in the same entry: of a row from an earlier one, the last updates
        may be among what is missing.
        """
        if not EARLIEST_TS_MS <= raw["ts"] < LATEST_TS_MS:
            return {**raw, "closed": True}  # judged at once: in hand it would stand in the way of all others
        if _begins_later(entry, raw):
            return {**raw, "closed": False}
        name = _series(entry, raw)
        held = self._held.get(name)
        if held is None and len(self._held) >= MAX_HELD:
            raise BadBarError("symbol_cap", f"{MAX_HELD} series have a bar in hand already")
        self._held[name] = raw
        self._changed.add(name)
        if held is None or held["ts"] == raw["ts"]:
            return {**raw, "closed": False}
        final = _follows(held, raw) or any(row is held for row in rows)
        return {**held, "closed": True} if final else {**raw, "closed": False}

    def changes(self) -> list[tuple[bytes, bytes]]:
        """The state fields to store for every row taken in hand since the last call."""
        fields = [(HELD + name.encode(), seal(self._held[name])) for name in sorted(self._changed)]
        self._changed.clear()
        return fields

    def forget(self) -> None:
        """After a loss of input nothing in hand is known to be final: let go of it."""
        self._changed |= self._held.keys()
        self._held = dict.fromkeys(self._held)

    def restore(self, fields: Mapping[bytes, bytes]) -> None:
        """Take up what `changes` gave; other fields are left alone. Raises `StateCorruptError`."""
        held = {name: data for name, data in fields.items() if name.startswith(HELD)}
        self._held = {name[len(HELD) :].decode(): unseal(name.decode(), data) for name, data in held.items()}


def _series(entry: Entry, raw: Raw) -> str:
    return f"{entry.key}|{raw['symbol']}|{raw['interval']}"


def _completed(raw: Raw, rule: InputRule, name: str) -> Raw:
    """`raw` with what the rule knows of its series."""
    symbol = rule.symbol or raw.get("symbol")
    interval = rule.interval or raw.get("interval")
    if name in TABLES and not (symbol and interval):
        raise BadBarError(
            "missing_field",
            "a bare row names neither symbol nor interval: set both for its key under `inputs`, "
            "or add the fields symbol and timeframe",
        )
    known = {"symbol": rule.prefix + symbol if isinstance(symbol, str) else symbol}
    return {**raw, **known, "interval": interval} if interval else {**raw, **known}


def _placed(raw: Raw) -> Raw:
    """`raw` with a whole `ts` and with a symbol and an interval that are text, or `BadBarError`."""
    placed = {**raw, "ts": whole(raw.get("ts"), "ts"), "interval": raw.get("interval", DEFAULT_INTERVAL)}
    for name in ("symbol", "interval"):
        if not isinstance(placed.get(name), str):
            raise BadBarError("missing_field", f"{name} is {placed.get(name)!r:.40}, text was expected")
    return placed


def _follows(held: Raw, raw: Raw) -> bool:
    """Whether no bar is missing between two rows of a series; over a weekend none is, of hourly and daily ones."""
    return missing_bars(held["ts"], raw["ts"], interval_ms(raw["interval"])) == 0


def _begins_later(entry: Entry, raw: Raw) -> bool:
    """Whether a bar begins only after its entry arrived, as far as the entry's ID is a time."""
    arrived_ms = int(entry.id.partition("-")[0])
    return arrived_ms >= EARLIEST_TS_MS and raw["ts"] > arrived_ms + interval_ms(raw["interval"])

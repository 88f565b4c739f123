"""The golden samples as entries, and the bars that `make_golden.py` put into them."""

from __future__ import annotations

import base64
import json
from decimal import Decimal
from pathlib import Path

from streams.messages import Entry

GOLDEN = Path(__file__).parent / "golden"
FIRST_OPEN_MS = 1_700_000_040_000
BARS = 6
NOW_MS = FIRST_OPEN_MS + 86_400_000


def golden(name: str) -> list[Entry]:
    """The entries of one sample, byte for byte as the library's publisher wrote them."""
    lines = (GOLDEN / f"{name}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [Entry(r["key"], r["id"], {k.encode(): base64.b64decode(v) for k, v in r["fields"].items()}) for r in rows]


def expected_ohlcv(k: int) -> tuple[float, ...]:
    """The k-th bar's values, from the same arithmetic in decimals as in `make_golden.py`."""
    start = Decimal("37012.40") + 10 * k
    return tuple(map(float, (start, start + Decimal("5.5"), start - Decimal("3.2"), start + 2, Decimal("1.25") * k)))


def entry(number: int = 1, key: str = "feed", /, **fields: object) -> Entry:
    """An entry with text fields; what is not text is written as JSON."""
    packed = {k.encode(): v if isinstance(v, bytes) else _text(v).encode() for k, v in fields.items()}
    return Entry(key, f"{FIRST_OPEN_MS + 3_600_000}-{number}", packed)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)

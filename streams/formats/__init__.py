"""Bars as other programs publish them: recognised by itself, entry by entry, and converted.

One small module a format, each with `NAME`, `SHAPE` (what it looks for, in words), `recognises` and
`read`. `FormatReader` tries them in order; `docs/feeds.md` describes them for users.
"""

from streams.formats.reader import FormatReader, InputRule, recognise

__all__ = ["FormatReader", "InputRule", "recognise"]

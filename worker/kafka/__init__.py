"""The Kafka engine. `faust -A worker.kafka worker -l info` runs the application `app`.

Its settings are those of `quartet run`, from `QUARTET_*` variables and `quartet.toml`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`app` is made when it is asked for: importing this package neither reads settings nor needs Faust."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from worker.kafka.serving import application  # noqa: PLC0415

    globals()["app"] = found = application()
    return found

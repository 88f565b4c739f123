"""All benchmarks, one after the other, each in a process of its own: `python -m benchmarks [NAME ...]`."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.machine import line

SUITE: dict[str, list[str]] = {
    "features": [],
    "agents": [],
    "quality": [],
    "commit": [],
    "pipeline": [],
    "recovery": [],
    "stages": [],
    "replay": [],
    "kafka": ["--minutes", "250", "--symbols", "240"],
    "memory": [],
    "training": ["--seeds", "1"],
}
"""Module to its arguments."""


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in SUITE]
    if unknown:
        print(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(SUITE)}", file=sys.stderr)
        return 2
    print(line())
    for name in names or SUITE:
        print(f"\n== {name}", flush=True)
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *SUITE[name]], check=False).returncode
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

"""`quartet`, and `python -m worker`."""

from __future__ import annotations

import sys

from worker.cli.app import invoke


def main() -> None:
    """Run the program and exit with its code."""
    sys.exit(invoke())


if __name__ == "__main__":
    main()

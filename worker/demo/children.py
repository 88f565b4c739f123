"""The processes of a demonstration: started apart from the terminal, watched, and stopped by their ids."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from worker.errors import QuartetError

STOP_S = 15.0


class ChildFailed(QuartetError):
    """A process of the demonstration ended before its time; the exit code is its own, or 1."""

    def __init__(self, name: str, code: int, log: Path) -> None:
        how = f"with exit code {code}" if code >= 0 else f"by signal {-code}"
        super().__init__(f"the {name} ended {how}; {log} ends: {tail(log)}")
        self.exit_code = code if code > 0 else 1


@dataclass(frozen=True)
class Child:
    """A running process and where its stderr goes."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def check(self, *, may_end: bool = False) -> bool:
        """Whether it has ended. Raises `ChildFailed` where it did not end well, or should not have ended."""
        code = self.process.poll()
        if code is not None and (code != 0 or not may_end):
            raise ChildFailed(self.name, code, self.log)
        return code is not None

    def stop(self) -> int:
        """Ask it to end, wait, and only then insist. Its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(STOP_S)


@contextlib.contextmanager
def child(name: str, arguments: Sequence[str], log: Path) -> Iterator[Child]:
    """A Python process with these arguments, stopped at the end; stderr to `log`, stdout to be read.

    It has a session of its own, so that Ctrl-C reaches it only through us, and no `QUARTET_*`
    variables: the demonstration is the same whatever the user has set.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    one = Child(name, process, log)
    try:
        yield one
    finally:
        one.stop()
        if process.stdout is not None:
            process.stdout.close()


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log in one."""
    found = log.read_text(errors="replace").splitlines()[-lines:]
    return " | ".join(line.strip() for line in found)[-600:] or "nothing"

"""A server with an append-only file that tests kill, copy, cut and start again on the same port."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from streams import embedded
from tests.helpers import answers, free_port, wait_for


def program(kind: str) -> str:
    """The path of `redis-server`, or of the Valkey that the program embeds."""
    return embedded._binary() if kind == "valkey" else str(shutil.which("redis-server"))


@dataclass
class Server:
    """`kill` is kill -9; the files in `directory` outlive it."""

    kind: str
    directory: Path
    port: int = field(default_factory=free_port)
    fsync: str = "everysec"
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        self.directory.mkdir(exist_ok=True)
        options = {"port": self.port, "bind": "127.0.0.1", "appendonly": "yes", "appendfsync": self.fsync, "save": ""}
        options |= {"dir": self.directory, "aof-load-truncated": "yes", "maxmemory-policy": "noeviction"}
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen([program(self.kind), *arguments], stdout=log, stderr=log)
        wait_for(lambda: answers(self.url) or self.process.poll() is not None)
        assert self.process.poll() is None, (self.directory / "log").read_text()[-2000:]
        return self

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def append_only_file(self) -> Path:
        """The file that grows with every write."""
        [found] = self.directory.glob("appendonlydir/*.incr.aof")
        return found

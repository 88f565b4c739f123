"""What the tests of recordings share: a worker's real work on a server, recorded, and changed afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streams.inputs import Inputs
from streams.keys import Keys
from streams.recording import Item, Recorded, Recording, Writer, read_header
from streams.redis import connect
from tests.chaos.scene import Fields, feed
from tests.helpers import quartet
from worker.logs import make_logger
from worker.record import Plan, Recorder
from worker.replay.verify import Verdict, verify
from worker.service import Options
from worker.serving import serve
from worker.settings import Settings


@dataclass
class Scene:
    """A namespace of a server with models; the worker and the recorder run in this process."""

    url: str
    namespace: str
    models: Path
    directory: Path
    further: dict[str, Any] = field(default_factory=dict)

    def settings(self, **changed: Any) -> Settings:
        own = {"redis": self.url, "namespace": self.namespace, "models": self.models, "state_dir": self.directory}
        given = {"http_port": 0, "lease_s": 0.5, "warmup_bars": {"v3": 30}, **own, **self.further, **changed}
        return Settings(**given)

    def feed(self, entries: Sequence[Fields], first: int = 0) -> None:
        feed(self.url, f"{self.namespace}:bars", entries, first)

    def work(self, **changed: Any) -> None:
        """Let a worker use up the input."""
        serve(self.settings(**changed), Options(until_idle_s=0.1), make_logger("error"))

    def plan(self, out: Path, **given: Any) -> Plan:
        settings = self.settings()
        inputs = Inputs(settings.input_keys, self.namespace)
        return Plan(out, Keys(self.namespace), inputs, **{"until_idle_s": 0.2, **given})

    def record(self, out: Path, **given: Any) -> list[str]:
        """Record until the streams are silent; what the recorder said."""
        said: list[str] = []
        Recorder(connect(self.url), self.plan(out, **given), said.append).run()
        return said

    def verify(self, file: Path, *, models: Path | None = None, **given: Any) -> Verdict:
        return verify(file, self.settings(models=models or self.models), **given)

    def quartet(self, *arguments: str | Path, code: int = 0) -> str:
        """Run the program itself with the shared flags; its standard output."""
        flags = ("--redis", self.url, "--namespace", self.namespace, "--models", self.models)
        done = quartet(*arguments, *flags, "--state-dir", self.directory, cwd=self.directory)
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout


def rewrite(
    source: Path, target: Path, change: Callable[[Item], Sequence[Item]], header: Mapping[str, Any] | None = None
) -> Path:
    """A copy of a recording in which each entry became what `change` makes of it."""
    kept = {name: value for name, value in read_header(source).items() if name != "recording"}
    with Writer(target) as writer:
        writer.header(kept | dict(header or {}))
        for item in Recording(source):
            for changed in change(item):
                writer.add(changed)
    return target


def edited(item: Recorded, edit: Callable[[dict[str, Any]], object]) -> Recorded:
    """The entry with its JSON edited."""
    data = json.loads(item.fields[b"data"])
    edit(data)
    return item._replace(fields={b"data": json.dumps(data, separators=(",", ":")).encode()})

"""`quartet top`: a live view of the worker that answers on --http-port."""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import with_settings
from worker.errors import Unavailable, UsageError
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.top import Frame

_TIMEOUT_S = 5.0
_REFRESH_S = 1.0


@with_settings
def top(
    settings: Settings,
    once: Annotated[bool, typer.Option("--once", help="One frame and no more, as when piped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One frame as a JSON object.")] = False,
    ports: Annotated[
        list[int] | None,
        typer.Option("--port", metavar="PORT", min=1, max=65535, help="A further stage's; may be repeated."),
    ] = None,
) -> None:
    """A live view of a running worker: who votes, who does not and why. Ctrl-C ends it.

    Where stages run as processes, --http-port is that of one and --port those of the others. Exit code 3 where
    one of them does not answer.
    """
    if settings.http_port == 0:
        raise UsageError("the worker's port is needed: give it with --http-port")
    with ExitStack() as stack:
        source = _Source(settings, _client(settings, stack), (settings.http_port, *(ports or ())))
        if as_json:
            _print_json(source.look())
        elif once or not sys.stdout.isatty():
            _print(source.look(), settings)
        else:
            _watch(source, settings)


def _print_json(frame: Frame) -> None:
    import orjson

    typer.echo(orjson.dumps(frame.as_json(), option=orjson.OPT_INDENT_2).decode())


def _print(frame: Frame, settings: Settings) -> None:
    from rich.console import Console

    from worker.top import render

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(render(frame, settings.quality))


def _watch(source: _Source, settings: Settings) -> None:
    from rich.live import Live

    from worker.top import render

    with Live(render(source.look(), settings.quality), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(render(source.look(), settings.quality), refresh=True)


def _client(settings: Settings, stack: ExitStack) -> Any:
    """A client of the worker's server, None where that cannot be reached from here: the rest is still true."""
    from worker.assembly import open_client, server_url

    try:
        client = open_client(stack.enter_context(server_url(settings, start=False)))
    except Exception as error:
        from worker.errors import expected

        if expected(error) is None:
            raise
        return None
    stack.callback(client.close)
    return client


@dataclass
class _Source:
    """Looks at a worker, again and again."""

    settings: Settings
    client: Any
    ports: Sequence[int]
    _before: tuple[float, float] | None = None

    def look(self) -> Frame:
        from worker.top import Samples, frame, together

        bases = [self._base(port) for port in self.ports]
        readiness = together([self._readiness(base) for base in bases])
        metrics = Samples(*(_get(f"{base}/metrics") for base in bases))
        rate = self._rate(sum(metrics.by("quartet_bars_total", "outcome").values()))
        votes, signal = self._streams(readiness["agents"])
        return frame(readiness, metrics, votes, signal, time.time(), rate)

    @staticmethod
    def _readiness(base: str) -> Mapping[str, Any]:
        from worker.top import parse_readiness

        try:
            return parse_readiness(_get(f"{base}/readyz"))
        except ValueError:
            raise Unavailable(f"what answers on {base} is no quartet worker") from None

    def _base(self, port: int) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.http_host, self.settings.http_host)  # noqa: S104
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def _rate(self, bars: float) -> float | None:
        now = time.monotonic()
        before, self._before = self._before, (now, bars)
        return None if before is None else max(0.0, bars - before[1]) / (now - before[0])

    def _streams(self, agents: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
        """The last vote of each agent and the last signal."""
        if self.client is None:
            return {}, None
        from streams.codec import from_json
        from streams.keys import Keys

        keys = Keys(self.settings.namespace)
        last = {agent: self.client.xrevrange(keys.votes(agent), count=1) for agent in agents}
        votes = {agent: from_json(found[0][1][b"data"]) for agent, found in last.items() if found}
        signals = self.client.xrevrange(keys.signals, count=1)
        return votes, {k: v for k, v in from_json(signals[0][1][b"data"]).items() if k != "votes"} if signals else None


def _get(url: str) -> str:
    """The text of an answer, good or bad. Raises `Unavailable` where nothing answers."""
    opener: Any = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return error.read().decode(errors="replace")
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"no worker answers on {url}: {reason}; start one, or give its --http-port") from None

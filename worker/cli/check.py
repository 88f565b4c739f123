"""`quartet check`: would it work, and if not, which line mends it."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import Bars, reading, with_settings
from worker.errors import CheckFailed, Unavailable, UsageError
from worker.settings import Settings, mask

if TYPE_CHECKING:
    from worker.check import Report, StreamReport

_TIMEOUT_S = 5.0


@with_settings
def check(
    settings: Settings,
    bars: Bars = None,
    live: Annotated[
        bool, typer.Option("--live", help="Ask the running worker on --http-port instead: its health check.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what `quartet run` would do with the bars and models that are there, without consuming anything.

    Exit code 0 where it would reach its quorum, 1 where not, 3 without a server.
    """
    settings = reading(settings, bars)
    ok = _live(settings, as_json=as_json) if live else _dry(settings, as_json=as_json)
    if not ok:
        raise typer.Exit(CheckFailed.exit_code)


def _dry(settings: Settings, *, as_json: bool) -> bool:
    from streams.formats import FormatReader
    from worker.assembly import open_client, rules_of, server_url
    from worker.check import examine_agents, examine_streams, judge

    now_ms = time.time_ns() // 1_000_000
    with server_url(settings, start=False) as url:
        client = open_client(url)
        streams, notes = examine_streams(client, settings, FormatReader(rules_of(settings)), now_ms)
        client.close()
    agents = examine_agents(settings, max((stream.longest for stream in streams), default=0))
    report = judge(settings, streams, agents, notes)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print(f"server     {mask(url)}, namespace {settings.namespace}")
        _print(report)
    return report.ready


def _print(report: Report) -> None:
    for stream in report.streams:
        for line in _lines(stream):
            print(line)
    for agent in report.agents:
        state = "would vote" if agent.would_vote else "would not vote"
        print(f"{agent.agent:<10} {state}{': ' if agent.why else ''}{agent.why}")
    for note in report.notes:
        print(f"note       {note}")
    print(report.line)


def _lines(stream: StreamReport) -> list[str]:
    """One stream in a few lines."""
    first = f"input      {stream.key}: {stream.length} entries"
    if not stream.read:
        return [first]
    formats = ", ".join(f"{name} ({count})" for name, count in stream.formats.items()) or "no known format"
    outcomes = ", ".join(f"{count} {name}" for name, count in stream.outcomes.items())
    reasons = ", ".join(f"{name} {count}" for name, count in stream.rejects.items())
    lines = [
        f"{first}; format of the last {stream.read}: {formats}",
        f"  {outcomes}{f' ({reasons})' if reasons else ''}",
    ]
    if stream.last_bar:
        lines.append(
            f"  last bar {stream.last_bar}, ended {stream.last_bar_age_s:.0f} s ago; {stream.series} series; "
            f"{stream.gaps} gaps, {stream.missing_bars} bars missing"
        )
    if stream.entries_per_day is not None:
        size = (stream.bytes_per_day or 0) / 2**20
        trimmed = "trimmed" if stream.trimmed else "not trimmed"
        lines.append(f"  grows {stream.entries_per_day} entries, {size:.1f} MiB a day; {trimmed}")
    if stream.waiting is not None:
        lines.append(f"  {stream.waiting} entries wait to be read")
    return lines


def _live(settings: Settings, *, as_json: bool) -> bool:
    """Whether the loop of the running worker turns; what keeps it from being ready is said besides."""
    if settings.http_port == 0:
        raise UsageError("--live needs the worker's port: give it with --http-port")
    host = f"[{settings.http_host}]" if ":" in settings.http_host else settings.http_host
    base = f"http://{host}:{settings.http_port}"
    healthy, text = _get(f"{base}/healthz")
    _, body = _get(f"{base}/readyz")
    try:
        readiness = json.loads(body)
    except ValueError:
        raise Unavailable(f"what answers on {base} is no quartet worker") from None
    if as_json:
        print(json.dumps({"healthy": healthy, **readiness}, indent=2))
        return healthy
    wanting = [f"{name}: {c['detail']}" for name, c in readiness["conditions"].items() if not c["ok"]]
    for name, agent in readiness["agents"].items():
        print(f"{name:<10} {agent['state']}{' ' + agent['reason'] if agent['reason'] else ''}")
    print(f"{'healthy' if healthy else text.strip()}, {'ready' if not wanting else 'not ready: ' + '; '.join(wanting)}")
    return healthy


def _get(url: str) -> tuple[bool, str]:
    """Whether the answer was a good one, and its text. Raises `Unavailable` where nothing answers."""
    opener: Any = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer:
            return True, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return False, error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(f"no worker answers on {url}: {reason}; start one, or give its --http-port") from None

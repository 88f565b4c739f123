"""`quartet gate`: whether votes would have been muted, and whether the market went with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streams.messages import CANARY
from worker.cli.options import with_settings
from worker.errors import CheckFailed, UsageError
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.gate import Verdict
    from worker.scoreboard import Scores
    from worker.stretch import Stretch

_LAST = 500


@with_settings
def gate(
    settings: Settings,
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="Such as nhits, or nhits_canary.")],
    first: Annotated[str | None, typer.Option("--from", metavar="ID", help="First entry of the votes stream.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="ID", help="Last entry of the votes stream.")] = None,
    last: Annotated[
        int | None,
        typer.Option("--last", metavar="N", min=1, help=f"The last N votes; {_LAST} unless --from is given."),
    ] = None,
    recording: Annotated[
        Path | None, typer.Option("--recording", metavar="FILE", help="A recording in place of the running server.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Judge a stretch of an agent's votes by the limits of the safeguard: PASS, FAIL or INSUFFICIENT.

    Exit code 0 for PASS, 1 for FAIL and INSUFFICIENT, 3 without a server.
    """
    from worker.gate import judge, score

    base = agent.removesuffix(CANARY)
    if base not in settings.quality:
        raise UsageError(f"unknown agent {agent}; the agents are {', '.join(settings.quality)}")
    count = _LAST if last is None and first is None else last
    span = {"first": _entry_id("--from", first) or "-", "end": _entry_id("--to", end) or "+", "last": count}
    stretch = _recorded(recording, agent, span) if recording else _live(settings, agent, span)
    known = _metadata(settings, base, stretch)
    verdict = judge(agent, stretch.votes, settings.quality[base], stretch.fingerprints(_features(known)))
    threshold = known.get("threshold")
    scores = score(stretch, float(threshold) if isinstance(threshold, float | int) else settings.threshold[base])
    if as_json:
        _print_json(verdict, scores, stretch)
    else:
        _print(verdict, scores, stretch)
    if verdict.verdict != "PASS":
        raise typer.Exit(CheckFailed.exit_code)


def _entry_id(flag: str, value: str | None) -> str | None:
    parts = (value or "").split("-")
    if value is not None and not (len(parts) <= 2 and all(part.isdecimal() for part in parts)):
        raise UsageError(f"{flag}: {value!r} is no entry ID, such as 1767225600000-0")
    return value


def _recorded(path: Path, agent: str, span: dict[str, Any]) -> Stretch:
    from streams.recording import RecordingError
    from worker.stretch import from_recording

    if not path.is_file():
        raise UsageError(f"{path}: no such file; make one with `quartet record --out FILE`")
    try:
        return from_recording(path, agent, **span)
    except RecordingError as error:
        raise UsageError(str(error)) from None


def _live(settings: Settings, agent: str, span: dict[str, Any]) -> Stretch:
    from streams.keys import Keys
    from worker.assembly import open_client, server_url
    from worker.stretch import from_server

    with server_url(settings, start=False) as url:
        client = open_client(url)
        try:
            return from_server(client, Keys(settings.namespace), agent, **span)
        finally:
            client.close()


def _metadata(settings: Settings, agent: str, stretch: Stretch) -> Mapping[str, Any]:
    """Of the artifact that made the last vote, empty where the models folder no longer has it."""
    from agents.agent import Refused
    from agents.discovery import discover
    from agents.sidecars import read_metadata

    version = stretch.votes[-1]["version"] if stretch.votes else None
    for candidate in discover(settings.models, agent) if settings.models.is_dir() else ():
        if candidate.version == version:
            try:
                return read_metadata(candidate)
            except Refused:
                break
    return {}


def _features(metadata: Mapping[str, Any]) -> Sequence[str]:
    """The names of what the model reads, none where its metadata has none."""
    names = metadata.get("features") or metadata.get("feature_names") or ()
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else ()


def _print_json(verdict: Verdict, scores: Scores, stretch: Stretch) -> None:
    import orjson

    whole = {**verdict.as_json(), "first": _bar(stretch, 0), "last": _bar(stretch, -1), "scoreboard": asdict(scores)}
    typer.echo(orjson.dumps(whole, option=orjson.OPT_INDENT_2).decode())


def _bar(stretch: Stretch, place: int) -> str:
    return str(stretch.votes[place]["bar_id"]) if stretch.votes else ""


def _print(verdict: Verdict, scores: Scores, stretch: Stretch) -> None:
    typer.echo(f"{verdict.verdict}  {verdict.agent}: {_reason(verdict)}")
    if stretch.votes:
        typer.echo(f"from {_bar(stretch, 0)} to {_bar(stretch, -1)}")
    for finding in verdict.findings:
        value = "-" if finding.value is None else f"{finding.value:.4g}"
        mark = f"  VIOLATED at {finding.bar_id}" if finding.violated else ""
        typer.echo(f"  {finding.criterion:<18} {value:>8}  limit {finding.limit:g}{mark}")
    typer.echo(_score_line(scores))


def _reason(verdict: Verdict) -> str:
    counts = f"{verdict.votes} votes in {verdict.attempts} attempts"
    if verdict.verdict == "INSUFFICIENT":
        return f"{counts}; at least {verdict.minimum} votes are needed to judge"
    if verdict.verdict == "FAIL":
        named = ", ".join(finding.criterion for finding in verdict.findings if finding.violated)
        return f"{counts}; {named}: it would have been muted at {verdict.muted_at}"
    return f"{counts}; nothing that would have muted it"


def _score_line(scores: Scores) -> str:
    if not scores.scored:
        return "scoreboard: no vote has its twelfth bar yet"
    acted = "no BUY or SELL among them"
    if scores.hit_ratio is not None and scores.signed_return_mean is not None:
        acted = f"{scores.hit_ratio:.1%} hits of {scores.acted} BUY and SELL, {scores.signed_return_mean:+.4%} a vote"
    return f"scoreboard: {scores.scored} votes scored 12 bars later: {acted}; Brier score {scores.brier_score:.3f}"

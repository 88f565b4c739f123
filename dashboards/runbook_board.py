"""The runbook inside Grafana: a text panel for each section, so that every link leads somewhere without a network."""

from __future__ import annotations

from grafana_foundation_sdk.builders import text
from grafana_foundation_sdk.models.text import TextMode

from dashboards.board import Board, Row
from dashboards.runbook import UID, sections


def board() -> Board:
    panels = [
        [
            (
                24,
                8,
                text.Panel()
                .title(title)
                .description(f"docs/runbook.md, {title}")
                .mode(TextMode.MARKDOWN)
                .content(body),
            )
        ]
        for title, body in sections().items()
    ]
    return Board(
        UID, "Runbook", "What each state and alert means, what to look at, what to do", [Row("", panels)], marks=()
    )

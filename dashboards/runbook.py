"""The runbook as a dashboard: one text panel for each section of `docs/runbook.md`, so that links work offline."""

from __future__ import annotations

import re
from pathlib import Path

FILE = Path(__file__).parent.parent / "docs" / "runbook.md"
UID = "quartet-runbook"


def sections() -> dict[str, str]:
    """Heading to text, in the order of the page; what precedes the first heading belongs to none."""
    _, *parts = re.split(r"^## ", FILE.read_text("utf-8"), flags=re.MULTILINE)
    pairs = (part.partition("\n") for part in parts)
    return {heading.strip(): text.strip() for heading, _, text in pairs}


def dashboard_link(section: str) -> str:
    """Where Grafana shows that section alone. Raises `ValueError` where the runbook has none of that name."""
    return f"/d/{UID}?viewPanel={list(sections()).index(section) + 1}"

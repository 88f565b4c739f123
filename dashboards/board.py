"""A dashboard around its panels: variables, annotations, links, and a grid without holes or overlaps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard

from dashboards import runbook
from dashboards.panels import SOURCE, TAG, Panel

WIDTH = 24
INTERVALS = {"1m": 60, "5m": 300, "15m": 900, "1h": 3600, "4h": 14400, "1d": 86400}
"""What the variable `interval` offers: the interval of the bars, in seconds in a query."""


@dataclass(frozen=True)
class Row:
    """Panels side by side, `widths` of 24 in all; a line of panels each. `repeat` makes one of each agent."""

    title: str
    lines: Sequence[Sequence[tuple[int, int, Panel]]]
    repeat: str = ""


@dataclass(frozen=True)
class Mark:
    """An annotation: a vertical line where `expr` has a sample."""

    name: str
    expr: str
    title: str
    color: str


MARKS = (
    Mark(
        "Muted",
        'changes(quartet_agent_state{state="muted"}[$__rate_interval]) > 0 and quartet_agent_state{state="muted"} == 1',
        "{{agent}} muted",
        "orange",
    ),
    Mark(
        "Loaded or reloaded",
        "quartet_agent_info unless on (agent, sha256, instance) quartet_agent_info offset 1m",
        "{{agent}} {{version}}",
        "blue",
    ),
    Mark(
        "Rolled back",
        "increase(quartet_agent_rollbacks_total[$__rate_interval]) > 0",
        "{{agent}} rolled back by the {{by}}",
        "red",
    ),
)


@dataclass(frozen=True)
class Board:
    """One dashboard. `uid` never changes: links and bookmarks carry it."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    with_agent: bool = False
    with_interval: bool = False
    marks: Sequence[Mark] = field(default=MARKS)

    def to_json(self) -> str:
        """The file that Grafana reads, the same bytes each time."""
        made = self._frame()
        number, y = 0, 0
        for row in self.rows:
            if row.title:
                number += 1
                made.with_row(_row(row, number, y))
                y += 1
            for line in row.lines:
                x = 0
                for width, height, panel in line:
                    number += 1
                    made.with_panel(panel.id(number).grid_pos(dashboard.GridPos(height, width, x, y)))
                    x += width
                y += line[0][1]
        return self._finished(made)

    def _frame(self) -> build.Dashboard:
        made = build.Dashboard(self.title).uid(self.uid).description(self.description).tags([TAG]).readonly()
        made.time("now-1h", "now").refresh("10s").timezone("browser").tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        if self.uid != runbook.UID:
            made.with_variable(_source())
        if self.with_agent:
            made.with_variable(_agents())
        if self.with_interval:
            made.with_variable(_intervals())
        for mark in self.marks:
            made.annotation(
                build.AnnotationQuery().name(mark.name).datasource(SOURCE).expr(mark.expr).icon_color(mark.color)
            )
        for link in _links():
            made.link(link)
        return made

    def _finished(self, made: build.Dashboard) -> str:
        value: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
        value["id"] = None  # the SDK leaves it out; written, no server takes it for one of its own
        # The SDK's type of annotations stops short of what Grafana's Prometheus source reads.
        for written, mark in zip(value["annotations"].get("list", []) if self.marks else [], self.marks, strict=True):
            written |= {"titleFormat": mark.title, "tagKeys": "agent", "step": "15s"}
        return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _row(row: Row, number: int, y: int) -> build.Row:
    made = build.Row(row.title).id(number).grid_pos(dashboard.GridPos(1, WIDTH, 0, y))
    return made.repeat(row.repeat) if row.repeat else made


def _source() -> build.DatasourceVariable:
    return build.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _agents() -> build.QueryVariable:
    return (
        build.QueryVariable("agent")
        .label("Agent")
        .datasource(SOURCE)
        .query("label_values(quartet_agent_state, agent)")
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(dashboard.VariableOption(text="All", value="$__all", selected=True))
    )


def _intervals() -> build.CustomVariable:
    first, seconds = next(iter(INTERVALS.items()))
    return (
        build.CustomVariable("interval")
        .label("Bar interval")
        .description("The interval of the bars that the worker is fed")
        .values(", ".join(f"{name} : {value}" for name, value in INTERVALS.items()))
        .options([dashboard.VariableOption(name == first, name, str(value)) for name, value in INTERVALS.items()])
        .current(dashboard.VariableOption(text=first, value=str(seconds), selected=True))
    )


def _links() -> tuple[build.DashboardLink, build.DashboardLink]:
    others = build.DashboardLink("quartet").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG])
    page = build.DashboardLink("Runbook").type(dashboard.DashboardLinkType.LINK).url(f"/d/{runbook.UID}")
    return others.keep_time(True).include_vars(True), page.icon("doc").tooltip("What each state and alert means")

"""What all dashboards share: one data source variable, units, thresholds, a description and a link on each panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import (
    dashboard as build,
)
from grafana_foundation_sdk.builders import (
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.runbook import dashboard_link
from streams.messages import AgentState

SOURCE = dashboard.DataSourceRef("prometheus", "${datasource}")
TAG = "quartet"
GREEN, YELLOW, RED, BLUE, GREY, PURPLE = "green", "yellow", "red", "blue", "#8e8e8e", "purple"
Steps = Sequence[tuple[float | None, str]]
Panel = Any
"""A builder of the SDK; its panel types share methods but no type."""

PLAIN: Steps = ((None, GREEN),)
STATE_CODES = {state: code for code, state in enumerate(AgentState, 1)}
STATE_COLORS = {
    AgentState.LOADING: GREY,
    AgentState.WARMING_UP: BLUE,
    AgentState.ACTIVE: GREEN,
    AgentState.CANARY: PURPLE,
    AgentState.SHADOW: "light-blue",
    AgentState.MUTED: "orange",
    AgentState.REFUSED: RED,
}


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series."""

    expr: str
    legend: str = ""
    instant: bool = False

    def target(self, number: int) -> prometheus.Dataquery:
        query = prometheus.Dataquery().expr(self.expr).ref_id(chr(ord("A") + number)).datasource(SOURCE)
        query.legend_format(self.legend or "__auto")
        return query.instant().format(PromQueryFormat.TABLE) if self.instant else query.range()


def _common(panel: Panel, title: str, text: str, queries: Sequence[Query], unit: str, steps: Steps, see: str) -> Panel:
    panel.title(title).description(text).datasource(SOURCE).unit(unit)
    panel.thresholds(thresholds(steps)).links([section_link(see)])
    for number, query in enumerate(queries):
        panel.with_target(query.target(number))
    return panel


def thresholds(steps: Steps) -> build.ThresholdsConfig:
    return (
        build.ThresholdsConfig()
        .mode(dashboard.ThresholdsMode.ABSOLUTE)
        .steps([dashboard.Threshold(value, color) for value, color in steps])
    )


def section_link(see: str) -> build.DashboardLink:
    """To the section of the runbook on what a panel shows."""
    return (
        build.DashboardLink(f"Runbook: {see}")
        .type(dashboard.DashboardLinkType.LINK)
        .url(dashboard_link(see))
        .target_blank(True)
    )


def figure(title: str, text: str, queries: Sequence[Query], *, unit: str, steps: Steps, see: str) -> Panel:
    """One big number for each series, the last one."""
    return (
        _common(stat.Panel(), title, text, queries, unit, steps, see)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .color_mode(common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_scheme(build.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
        .no_value("no data")
    )


def chart(
    title: str,
    text: str,
    queries: Sequence[Query],
    *,
    unit: str,
    see: str,
    steps: Steps = PLAIN,
    stacked: bool = False,
    top: float | None = None,
) -> Panel:
    """Lines over time; thresholds other than `PLAIN` are drawn as dashed lines."""
    lines = common.GraphThresholdsStyleMode.DASHED if len(steps) > 1 else common.GraphThresholdsStyleMode.OFF
    panel = (
        _common(timeseries.Panel(), title, text, queries, unit, steps, see)
        .thresholds_style(common_builders.GraphThresholdsStyleConfig().mode(lines))
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .fill_opacity(30 if stacked else 5)
        .axis_soft_min(0)
        .min(0)
    )
    if stacked:
        panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    return panel if top is None else panel.max(top)


def states(title: str, text: str, selector: str, *, see: str) -> Panel:
    """A band for each agent, coloured by its state."""
    parts = (f'{code} * quartet_agent_state{{{selector},state="{state}"}}' for state, code in STATE_CODES.items())
    expr = f"max by (agent) (sum by (agent, instance) ({' or '.join(parts)}))"
    names = {
        str(code): dashboard.ValueMappingResult(text=str(state), color=STATE_COLORS[state], index=code)
        for state, code in STATE_CODES.items()
    }
    steps = [(None, GREY), *((float(code), STATE_COLORS[state]) for state, code in STATE_CODES.items())]
    return (
        _common(statetimeline.Panel(), title, text, [Query(expr, "{{agent}}")], "none", steps, see)
        .mappings([dashboard.ValueMap(names)])
        .merge_values(True)
        .show_value(common.VisibilityMode.AUTO)
        .row_height(0.8)
        .fill_opacity(80)
    )


def listing(title: str, text: str, query: Query, columns: dict[str, str], *, see: str) -> Panel:
    """A table of labels: `columns` from label to heading; the others are hidden."""
    hidden = dict.fromkeys(("Time", "Value", "__name__", "instance", "job"), True)
    order = {label: place for place, label in enumerate(columns)}
    return (
        _common(table.Panel(), title, text, [query], "none", PLAIN, see)
        .with_transformation(
            dashboard.DataTransformerConfig(
                "organize", options={"excludeByName": hidden, "indexByName": order, "renameByName": columns}
            )
        )
        .show_header(True)
        .inspect(False)
    )


def share(part: str, whole: str) -> str:
    """`part` over `whole`, 0 where nothing came."""
    return f"{part} / ({whole} > 0) or 0 * {whole}"


def quantiles(metric: str, by: str = "") -> list[Query]:
    """The median, the 95th and the 99th percentile of a histogram."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return [
        Query(
            f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))",
            f"p{round(q * 100)}{legend}",
        )
        for q in (0.5, 0.95, 0.99)
    ]

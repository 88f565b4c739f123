"""What a person sees: the live table, the summary, and the picture of both."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from streams.messages import Action, Status
from worker.demo.follow import Tally, View
from worker.demo.story import Story
from worker.training.market import NOTE

PICTURE_WIDTH = 92
_STATE_STYLE = {"active": "green", "canary": "cyan", "refused": "red", "muted": "yellow"}
_ACTION_STYLE = {"BUY": "green", "SELL": "red", "HOLD": "dim", "ABSTAIN": "yellow"}


@dataclass(frozen=True)
class Outcome:
    """A finished demonstration: what was seen last, what the streams hold, and how long it took."""

    view: View
    tally: Tally
    seconds: float
    metrics_url: str
    metrics_file: Path
    models: Path
    story: Story | None = None

    @property
    def rate(self) -> float:
        """Bars a second, from the first bar published to the last signal committed."""
        return self.tally.bars / self.seconds

    @property
    def differences(self) -> list[str]:
        return self.tally.differences(self.view)

    @property
    def actions(self) -> dict[str, int]:
        """Signals by action."""
        counted = Counter[str]()
        for (action, _), n in self.tally.signals.items():
            counted[action] += n
        return {name: counted[name] for name in ("BUY", "SELL", "HOLD")}

    @property
    def statuses(self) -> dict[str, int]:
        """Signals by status."""
        counted = Counter[str]()
        for (_, status), n in self.tally.signals.items():
            counted[status] += n
        return {str(status): counted[str(status)] for status in Status}

    def as_json(self) -> dict[str, Any]:
        return {
            "synthetic": True,
            "headline": self.view.headline,
            "counts": {kind: int(n) if n.isdigit() else n for kind, n in self.view.counts.items()},
            "bars": {"published": self.tally.bars, **self.view.bars},
            "bars_per_second": round(self.rate, 1),
            "seconds": round(self.seconds, 3),
            "signals": {
                "total": sum(self.tally.signals.values()),
                "by_action": self.actions,
                "by_status": self.statuses,
            },
            "agents": {
                x.agent: {
                    "state": x.state,
                    "reason": x.reason,
                    "version": x.version,
                    "abstentions": dict(self.tally.abstentions[x.agent]),
                    "votes": {a.name: self.tally.votes[x.agent].get(a.name, 0) for a in Action},
                }
                for x in self.view.agents
            },
            "streams_and_metrics_agree": not self.differences,
            "differences": self.differences,
            "metrics": {"url": self.metrics_url, "file": str(self.metrics_file)},
            "models": str(self.models),
            **({} if self.story is None else {"sabotage": self.story.as_json()}),
        }


def agents_table(view: View) -> Table:
    """One row an agent: state, votes by action, and why it does not vote or how often it abstained."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("agent", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for action in ("BUY", "SELL", "HOLD", "ABSTAIN"):
        table.add_column(action, justify="right", no_wrap=True)
    table.add_column("last vote", no_wrap=True)
    table.add_column("why not", no_wrap=True)
    last = view.last[0]["votes"] if view.last else {}
    for one in view.agents:
        vote = last.get(one.agent)
        table.add_row(
            one.agent,
            Text(one.state, style=_STATE_STYLE.get(one.state, "yellow")),
            *(f"{one.votes.get(action, 0):,}" for action in ("BUY", "SELL", "HOLD", "ABSTAIN")),
            _vote_text(vote["action"], vote["confidence"]) if vote else "",
            one.reason or ", ".join(f"{n:,} {reason}" for reason, n in one.abstentions.items()),
        )
    return table


def agents_part(view: View) -> Group:
    """The table, and under it in full why an agent was refused."""
    details = [f"{one.agent}: {one.reason}: {one.detail}" for one in view.agents if one.detail]
    return Group(agents_table(view), *(Text(text, style="red") for text in details))


def _vote_text(action: str, confidence: float) -> Text:
    return Text(f"{action:<4} {confidence:.2f}", style=_ACTION_STYLE.get(action, ""))


def signals_table(view: View, rows: int = 6) -> Table:
    """The newest signal of the first symbols."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("symbol", "signal", "status"):
        table.add_column(name, no_wrap=True)
    table.add_column("agreeing", justify="right", no_wrap=True)
    table.add_column("configured, loaded, voting", no_wrap=True)
    for signal in sorted(view.last, key=lambda one: str(one["symbol"]))[:rows]:
        table.add_row(
            signal["symbol"],
            _vote_text(signal["action"], signal["confidence"]),
            signal["status"],
            f"{signal['agreeing']}/{signal['voting']}",
            f"{signal['configured']}, {signal['loaded']}, {signal['voting']}",
        )
    return table


def live(view: View, total: int, seconds: float) -> Group:
    """The screen while bars come in."""
    rate = view.consumed / seconds if seconds > 0 else 0.0
    head = Text(f"{view.headline}\n", style="bold")
    head.append(
        f"bars {view.consumed:,} of {total:,}, {rate:,.0f} a second; signals {sum(view.signals.values()):,}", "not bold"
    )
    return Group(head, "", agents_part(view), "", signals_table(view))


def line(view: View, total: int, seconds: float) -> str:
    """The same for a log or a pipe, in one line."""
    signals = Counter[str]()
    for (action, _), n in view.signals.items():
        signals[action] += n
    return (
        f"{seconds:5.1f} s  bars {view.consumed:,} of {total:,}; signals {sum(signals.values()):,} "
        f"(BUY {signals['BUY']:,}, SELL {signals['SELL']:,}, HOLD {signals['HOLD']:,}); {view.headline}"
    )


def summary(outcome: Outcome) -> Group:
    """What it came to; the counts are those of the streams."""
    bars = ", ".join(f"{name} {n:,}" for name, n in outcome.view.bars.items() if n or name == "accepted")
    actions = ", ".join(f"{name} {n:,}" for name, n in outcome.actions.items())
    statuses = ", ".join(f"{name} {n:,}" for name, n in outcome.statuses.items() if n)
    facts = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True, style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("bars in", f"{outcome.tally.bars:,} ({bars})")
    facts.add_row("signals out", f"{sum(outcome.tally.signals.values()):,}: {actions}")
    facts.add_row("by status", statuses)
    if outcome.story is None:
        facts.add_row(
            "rate", f"{outcome.rate:,.0f} bars a second, {outcome.seconds:.1f} s from first bar to last signal"
        )
    else:
        _add_story(facts, outcome.story)
    facts.add_row("check", _check(outcome))
    facts.add_row("metrics", f"{outcome.metrics_url}/metrics while it runs; last scrape in {outcome.metrics_file}")
    facts.add_row("market", NOTE)
    return Group(Text(outcome.view.headline, style="bold"), "", agents_part(outcome.view), "", facts)


_NAMES = {
    "agent_refused": "refused",
    "reload": "swapped in",
    "agent_muted": "muted",
    "agent_readmitted": "back",
    "agent_locked": "locked",
}


def _add_story(facts: Table, story: Story) -> None:
    """What was sabotaged, what became of it, and the signals before and after."""
    for place, text in enumerate(story.sabotaged):
        facts.add_row("" if place else "sabotage", text)
    for turn in story.turns:
        facts.add_row(_NAMES.get(turn.kind, turn.kind), turn.in_words)
    facts.add_row("before", _counted(story.before))
    facts.add_row("after", _counted(story.after))
    for text in story.missing:
        facts.add_row("MISSING", Text(text, style="red"))


def _counted(statuses: Mapping[str, int]) -> str:
    """Signals by status, in the contract's order."""
    found = [f"{status} {statuses[status]:,}" for status in Status if statuses.get(status)]
    return f"{sum(statuses.values()):,} signals: {', '.join(found)}" if found else "no signal"


def _check(outcome: Outcome) -> Text:
    if outcome.differences:
        return Text("streams and metrics DIFFER: " + "; ".join(outcome.differences), style="red")
    return Text("every count above was read from the streams, and the metrics agree", style="green")


def next_steps(outcome: Outcome) -> list[str]:
    """What to type next."""
    return [
        "Next: look at these models, train on bars of your own, then serve from your Redis:",
        f"  quartet models list --models {outcome.models}",
        "  quartet train --bars bars.csv --agent all --models models",
        "  quartet run --redis redis://HOST:6379 --models models",
    ]


def picture(outcome: Outcome, file: Path) -> None:
    """Write the last screen as an SVG that loads nothing from anywhere."""
    console = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(summary(outcome))
    text = console.export_svg(title="quartet demo", unique_id="quartet-demo")
    file.parent.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"@font-face\s*\{.*?\}\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL)
    file.write_text(text, encoding="utf-8")

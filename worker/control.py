"""Operators' orders: what an entry of `quartet:control` may say, and what it does between two batches.

An order is one field `data`, a JSON object: `order`, and as it needs `agent`, `file`, `sha256`, `by`.
Everything here is pure but for the agents that it changes; loading is `worker.reload`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import orjson

from agents.agent import Model
from agents.artifacts import Loading
from streams.messages import AGENTS, CANARY, AgentState, Entry, Event, Reason
from worker.roster import Artifact
from worker.stages.agents import WAITING, AgentGroup

STAGE, REASON = "control", "order"
"""Stage and reason of a rejected order."""

ORDERS = ("reload", "canary", "shadow", "mute", "unmute", "promote", "rollback")
TRIALS = ("canary", "shadow")
GATE_VOTES = 200
"""Least votes in a canary's window for its promotion, however low the limits are set."""

MAX_BYTES = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BadOrderError(Exception):
    """An entry that is no order; says what was expected."""


@dataclass(frozen=True, slots=True)
class Order:
    """One order. `agent` is empty only for a reload of all; `file` and `sha256` only for a trial are not."""

    order: str
    agent: str = ""
    file: str = ""
    sha256: str = ""
    by: str = ""
    id: str = ""

    def encode(self) -> bytes:
        """The bytes of the field `data`."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "id"}
        return orjson.dumps({name: value for name, value in kept.items() if value})

    def evidence(self) -> dict[str, str]:
        return {"order": self.id, "by": self.by}


def parse(entry: Entry, agents: Sequence[str] = AGENTS) -> Order:
    """The order of an entry. Raises `BadOrderError`; `agents` are the configured ones."""
    if set(entry.fields) != {b"data"}:
        shown = ", ".join(name.decode(errors="replace")[:32] for name in list(entry.fields)[:8])
        raise BadOrderError(f"fields {shown}: an order has the one field data")
    data = entry.fields[b"data"]
    if len(data) > MAX_BYTES:
        raise BadOrderError(f"{len(data)} bytes: an order has at most {MAX_BYTES}")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadOrderError(f"data is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadOrderError("data is not a JSON object")
    return _order(value, entry.id, agents)


def _order(value: Mapping[str, Any], entry_id: str, agents: Sequence[str]) -> Order:
    known = {f.name for f in fields(Order)} - {"id"}
    for name, text in value.items():
        if name not in known:
            raise BadOrderError(f"unknown name {name[:32]!r}: the names are {', '.join(sorted(known))}")
        if not isinstance(text, str) or not text or len(text) > 1024 or not text.isprintable():
            raise BadOrderError(f"{name}: expected a printable text of 1 to 1024 characters")
    order = Order(**value, id=entry_id) if "order" in value else None
    if order is None or order.order not in ORDERS:
        raise BadOrderError(f"order {value.get('order', '(absent)')[:32]!r}: expected one of {', '.join(ORDERS)}")
    if order.agent not in agents and (order.agent or order.order != "reload"):
        raise BadOrderError(f"agent {order.agent[:32]!r} is not configured: the agents are {', '.join(agents)}")
    is_trial = order.order in TRIALS
    if is_trial and not (order.file and _SHA256.fullmatch(order.sha256)):
        raise BadOrderError(f"{order.order} needs file, and sha256 of 64 hexadecimal digits")
    if not is_trial and (order.file or order.sha256):
        raise BadOrderError(f"{order.order} takes neither file nor sha256")
    return order


# ---------------------------------------------------------------------- what an order does


def refused(order: Order, agent: str, reason: str, detail: str, evidence: Mapping[str, Any] | None = None) -> Event:
    """The answer to an order that was not carried out."""
    told = {**order.evidence(), "refused": order.order, **(evidence or {})}
    return Event("order_refused", agent=agent, reason=reason, detail=detail, evidence=told)


def mute(group: AgentGroup, order: Order) -> Event:
    """From now on the agent computes without weight, until an operator says otherwise."""
    group.safeguard.mute(order.agent)
    detail = f"muted until `quartet models unmute {order.agent}`"
    return Event(
        "agent_muted", agent=order.agent, reason=str(Reason.OPERATOR), detail=detail, evidence=order.evidence()
    )


def unmute(group: AgentGroup, order: Order, *, alone: bool = True) -> Event:
    """The agent votes again, from an empty window, with its re-admissions given back.

    Where it is not `alone`, missed deadlines may have muted it, which the consensus knows and forgives.
    """
    _, why = group.safeguard.status(order.agent, AgentState.ACTIVE)
    if why is None and alone:
        return refused(order, order.agent, "not_muted", f"{order.agent} is not muted")
    group.safeguard.unmute(order.agent)
    was = why or str(Reason.DEADLINE_MISSED)
    detail = f"it was muted for {why}" if why else "missed deadlines are forgiven, if it was muted for them"
    detail = f"{detail}; its window starts anew"
    evidence = {**order.evidence(), "was": was}
    return Event("agent_readmitted", agent=order.agent, reason=str(Reason.OPERATOR), detail=detail, evidence=evidence)


def begin_trial(group: AgentGroup, order: Order, loading: Loading) -> Event:
    """Put a version beside the running one, if it is the very file that was ordered and nothing is there yet."""
    trial = group.records[order.agent].trial
    if trial is not None:
        detail = (
            f"{trial.artifact.version} is already a {trial.kind} beside {order.agent}: "
            f"`quartet models promote {order.agent}` or `quartet models rollback {order.agent}` first"
        )
        return refused(order, order.agent, "trial_running", detail, trial.artifact.evidence())
    if loading.model is None:
        return refused(order, order.agent, *_why(loading), {"file": order.file})
    if loading.model.sha256 != order.sha256:
        detail = f"{order.file} has sha256 {loading.model.sha256[:12]}, ordered was {order.sha256[:12]}: order again"
        return refused(order, order.agent, "file_changed", detail, {"file": order.file})
    if Artifact.of(loading.model).is_same(group.records[order.agent].artifact):
        detail = f"{loading.model.version} is what serves, with the same scaler and metadata: name another version"
        return refused(order, order.agent, "same_artifact", detail, {"file": order.file})
    kind = AgentState(order.order)
    group.begin_trial(order.agent, loading.model, kind)
    share = f"with {group.canary_share:.0%} of the weight" if kind is AgentState.CANARY else "with weight 0"
    detail = (
        f"{loading.model.version} beside the running one {share}; "
        f"any violation within {group.canary_period_ms / 3_600_000:g} hours of bars rolls it back"
    )
    evidence = {**order.evidence(), **Artifact.of(loading.model).evidence(), "weight": group.canary_share}
    if kind is AgentState.SHADOW:
        evidence["weight"] = 0.0
    return Event(f"{kind}_started", agent=order.agent + CANARY, detail=detail, evidence=evidence)


def promote(group: AgentGroup, order: Order) -> Event:
    """The version beside the running one takes its seat, if the gate passes with at least 200 votes."""
    agent, record = order.agent, group.records[order.agent]
    if record.trial is None:
        return refused(order, agent, "no_trial", f"nothing runs beside {agent}: `quartet models canary {agent} FILE`")
    canary = agent + CANARY
    quality = group.safeguard.quality(canary)
    _, muted = group.safeguard.status(canary, AgentState.CANARY)
    evidence = {
        **record.trial.artifact.evidence(),
        "votes": quality.votes,
        "violations": [str(criterion) for criterion in quality.violations],
        "figures": {str(criterion): figure for criterion, figure in quality.figures.items()},
    }
    if muted is not None or quality.violations:
        reason = muted or str(quality.violations[0])
        return refused(order, agent, reason, f"the gate fails: {reason}; {canary} stays as it is", evidence)
    if not quality.sufficient or quality.votes < GATE_VOTES:
        detail = f"the gate needs {GATE_VOTES} votes, {canary} has {quality.votes}: wait for more bars"
        return refused(order, agent, "insufficient", detail, evidence)
    replaces = record.artifact.evidence() if record.artifact else {}
    group.promote(agent)
    detail = f"{record.trial.artifact.version} takes the seat; `quartet models rollback {agent}` takes it back; "
    detail += WAITING.format(agent)
    return Event(
        "promoted", agent=agent, detail=detail, evidence={**order.evidence(), **evidence, "replaces": replaces}
    )


def end_trial(group: AgentGroup, order: Order) -> Event:
    """Take the canary or shadow away."""
    trial = group.records[order.agent].trial
    assert trial is not None  # noqa: S101 - the caller has seen it
    group.end_trial(order.agent)
    detail = f"the {trial.kind} {trial.artifact.version} is taken away; the running version stays; "
    detail += WAITING.format(order.agent)
    evidence = {**order.evidence(), **trial.artifact.evidence(), "since": trial.since, "kind": str(trial.kind)}
    return Event("rolled_back", agent=order.agent + CANARY, reason="operator", detail=detail, evidence=evidence)


def go_back(group: AgentGroup, order: Order, loading: Loading | None) -> Event:
    """Serve the artifact that served before, and keep it until an operator reloads the agent."""
    if loading is None:
        detail = f"nothing served before and nothing runs beside {order.agent}: there is nothing to go back to"
        return refused(order, order.agent, "nothing_before", detail)
    if loading.model is None:
        return refused(order, order.agent, *_why(loading))
    replaced = group.records[order.agent].artifact
    group.install(order.agent, loading.model, pinned=True)
    detail = f"{loading.model.version} serves again; {WAITING.format(order.agent)}"
    evidence = {**order.evidence(), **_swap(loading.model, replaced)}
    return Event("rolled_back", agent=order.agent, reason="operator", detail=detail, evidence=evidence)


def reload(group: AgentGroup, loading: Loading, order: Order | None) -> Event:
    """Swap in what was loaded, or say why the running one is kept. Without an order the folder was looked at."""
    agent = loading.agent
    replaced = group.records[agent].artifact
    told: dict[str, Any] = {} if order is None else dict(order.evidence())
    if loading.model is None:
        reason, detail = _why(loading)
        kept = f"{replaced.version} serves on" if group.voting.serves(agent) and replaced else "no model serves"
        if loading.candidate is not None:
            told["file"] = str(loading.candidate.file)
        return Event("reload_refused", agent=agent, reason=reason, detail=f"{detail}; {kept}", evidence=told)
    group.install(agent, loading.model, pinned=False)
    what = Artifact.of(loading.model).change(replaced)
    detail = "; ".join(part for part in (what, loading.model.detail, loading.note) if part)
    return Event("reload", agent=agent, detail=detail, evidence={**told, **_swap(loading.model, replaced)})


def skipped(group: AgentGroup, agent: str, evidence: Mapping[str, Any]) -> Event:
    """A reload of all, or a newer file in the folder, leaves out an agent that was promoted or rolled back."""
    artifact = group.records[agent].artifact
    serves = artifact.version if artifact else "nothing"
    detail = f"it is pinned to {serves} by a promotion or rollback: `quartet models reload {agent}` takes the newest"
    return Event("reload_skipped", agent=agent, reason="pinned", detail=detail, evidence=evidence)


def _swap(model: Model, replaced: Artifact | None) -> dict[str, Any]:
    return {**Artifact.of(model).evidence(), "replaces": replaced.evidence() if replaced else {}}


def _why(loading: Loading) -> tuple[str, str]:
    refusal = loading.refusal
    return (str(refusal.reason), refusal.detail) if refusal else ("", "")

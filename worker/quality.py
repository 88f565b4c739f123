"""What counts as degenerate: the criteria, their limits, and how limits are read from settings.

The one definition of these numbers, for the running worker, the gate and the warnings of training.
Imports nothing heavy: settings are read by every command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from streams.messages import AGENTS, Reason

WINDOW = 500
"""Attempts that an agent is judged by."""

CRITERIA = (
    Reason.ACTION_COLLAPSE,
    Reason.DEAD_ZONE,
    Reason.FLAT_CONFIDENCE,
    Reason.NARROW_RANGE,
    Reason.CONSTANT_OUTPUT,
    Reason.NON_FINITE_OUTPUT,
    Reason.ERROR_RATE,
    Reason.DEADLINE_MISSED,
    Reason.STALE,
)
"""What an agent can be muted for, in the order in which the first that applies is the reason."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Run = Annotated[int, Field(ge=2)]


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """When votes are degenerate. Shares are of the window; `minimum` is the least that is judged.

    Violated is: an action, HOLD or failure share above its limit, a deviation or range of confidence
    below it, a run of its length. `constant_run` counts votes in a row with the same outputs,
    `non_finite_run` attempts in a row that gave none (needs no minimum: each of them abstained), and
    `non_finite_share` is the share of such attempts, scattered ones too.
    `probation`: under the minimum an agent's votes count (`vote`) or are only recorded (`shadow`).
    """

    minimum: Annotated[int, Field(ge=2, le=WINDOW)] = 200
    action_share: Share = 0.70
    hold_share: Share = 0.85
    confidence_stddev: Share = 0.05
    confidence_range: Share = 0.12
    constant_run: Run = 200
    non_finite_run: Run = 20
    non_finite_share: Share = 0.05
    error_share: Share = 0.05
    deadline_share: Share = 0.05
    stale_share: Share = 0.05
    probation: Literal["vote", "shadow"] = "vote"

    def by_criterion(self) -> tuple[float, ...]:
        """The limits in the order of `CRITERIA`; of non-finite outputs that of their run."""
        return (
            *(self.action_share, self.hold_share, self.confidence_stddev, self.confidence_range),
            *(float(self.constant_run), float(self.non_finite_run)),
            *(self.error_share, self.deadline_share, self.stale_share),
        )

    def of(self, criterion: Reason) -> float:
        """The limit of one of `CRITERIA`."""
        return self.by_criterion()[CRITERIA.index(criterion)]


@dataclass(frozen=True, slots=True)
class EnsembleLimits:
    """Where the ensemble as a whole is a concern. Ratios over at least `minimum` signals of the window."""

    minimum: Annotated[int, Field(ge=2, le=WINDOW)] = 200
    agreement_low: Share = 0.55
    agreement_high: Share = 0.80
    hard_disagreement: Share = 0.20


_Limits = TypeVar("_Limits", QualityLimits, EnsembleLimits)


def read_limits(given: Any) -> Any:
    """The limits of every agent from a table of limits, in which an agent's own table replaces single ones.

    Raises ValueError that names what is unknown or out of range. What is no table is left to the caller.
    """
    if not isinstance(given, Mapping):
        return given
    general = {name: value for name, value in given.items() if name not in AGENTS}
    base = _checked(QualityLimits, general, "")
    limits = {}
    for agent in AGENTS:
        own = given.get(agent, {})
        if isinstance(own, QualityLimits):
            limits[agent] = own
        elif isinstance(own, Mapping):
            checked = _checked(QualityLimits, own, f"{agent}.")
            limits[agent] = replace(base, **{name: getattr(checked, name) for name in own})
        else:
            raise ValueError(f"{agent}: a table of limits was expected; found {own!r}")  # noqa: TRY004  pydantic reports it
    return limits


def read_ensemble_limits(given: Any) -> Any:
    """The limits of the ensemble from a table; raises as `read_limits`."""
    return _checked(EnsembleLimits, given, "") if isinstance(given, Mapping) else given


def _checked(kind: type[_Limits], given: Mapping[str, Any], prefix: str) -> _Limits:
    names = [field.name for field in fields(kind)]
    for name in given:
        if name not in names:
            raise ValueError(f"unknown limit {prefix}{name}; the limits are {', '.join(names)}")
    try:
        return TypeAdapter(kind).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        raise ValueError(f"{prefix}{name}: {first['msg'].lower()}; found {first['input']!r}") from None

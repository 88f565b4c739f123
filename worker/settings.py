"""The settings: flags, then `QUARTET_*` variables, then one TOML file, then defaults.

`Settings(...)` itself reads nothing but its arguments; `load` is what adds the environment and the
file. A setting that is not known is an error wherever it stands. Times carry their unit in the name.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from typing_extensions import TypedDict

from agents.sidecars import DEFAULT_RESIDUAL_STD, DEFAULT_THRESHOLD
from streams.contracts import FEATURE_SETS
from streams.keys import DEFAULT_NAMESPACE, Keys
from streams.messages import AGENTS
from worker.errors import UsageError
from worker.quality import EnsembleLimits, QualityLimits, read_ensemble_limits, read_limits

EMBEDDED = "embedded"
PREFIX = "QUARTET_"
DEFAULT_FILE = Path("quartet.toml")
SECRETS = ("redis",)
"""Settings that may hold a password: masked when shown, and readable from a file named by `QUARTET_<NAME>_FILE`."""

_INTERVAL = re.compile(r"[1-9][0-9]*[smhd]")
_BROKER = re.compile(r"kafka://[A-Za-z0-9._\[\]:-]+:[0-9]{1,5}(,[A-Za-z0-9._\[\]:-]+:[0-9]{1,5})*")
_NAMESPACE = re.compile(r"[^\s{}\x00-\x1f\x7f]{1,128}")


def _split(value: Any) -> Any:
    """`a,b` is a list where a list is expected, as in an environment variable."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _known_agents(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in AGENTS]
    if unknown:
        raise ValueError(f"unknown agent {', '.join(unknown)}; the agents are {', '.join(AGENTS)}")
    return tuple(name for name in AGENTS if name in names)


def _known_sets(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in FEATURE_SETS]
    if unknown:
        raise ValueError(f"unknown feature set {', '.join(unknown)}; the sets are {', '.join(FEATURE_SETS)}")
    return tuple(name for name in FEATURE_SETS if name in names)


def _overrides(defaults: Mapping[str, Any]) -> BeforeValidator:
    """What is given replaces single entries of `defaults`; a name that is not among them is an error."""

    def merge(given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        unknown = [name for name in given if name not in defaults]
        if unknown:
            raise ValueError(f"unknown name {', '.join(map(str, unknown))}; the names are {', '.join(defaults)}")
        return {**defaults, **given}

    return BeforeValidator(merge)


_DEFAULT_WEIGHTS = MappingProxyType({"xgboost": 0.30, "lightgbm": 0.30, "nhits": 0.20, "patchtst": 0.20})
_DEFAULT_WARMUP = MappingProxyType({name: s.warmup_bars for name, s in FEATURE_SETS.items()})
_DEFAULT_THRESHOLD = MappingProxyType(dict.fromkeys(AGENTS, DEFAULT_THRESHOLD))
_DEFAULT_RESIDUAL = MappingProxyType(dict.fromkeys(AGENTS, DEFAULT_RESIDUAL_STD))

Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
AgentNames = Annotated[Names, AfterValidator(_known_agents)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Frozen = AfterValidator(MappingProxyType)


def _of_the_form(interval: str) -> str:
    if not _INTERVAL.fullmatch(interval):
        raise ValueError("expected a number with s, m, h or d, such as 1m")
    return interval


class InputSetting(TypedDict, total=False):
    """What the entries of one key, or of the keys of one pattern, do not say themselves."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    symbol: str
    interval: Annotated[str, AfterValidator(_of_the_form)]
    closed: Literal["flag", "next", "always"]
    prefix: str


class Settings(BaseSettings):
    """Every setting with its default. Immutable; unknown names are refused."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", frozen=True, extra="forbid")

    redis: str = Field(EMBEDDED, description="server URL, or `embedded` for the one of the state directory")
    broker: str | None = Field(None, description="kafka://HOST:PORT[,HOST:PORT] to run on Kafka instead of Redis")
    namespace: str = Field(DEFAULT_NAMESPACE, description="what every key begins with")
    bars: Names = Field((), description="input keys and patterns; the namespace's own bars key unless set")
    inputs: Annotated[Mapping[str, InputSetting], Frozen] = Field(
        default_factory=dict, description="per key or pattern: symbol, interval, closed, prefix; see docs/feeds.md"
    )
    models: Path = Field(Path("models"), description="directory of the artifacts")
    state_dir: Path = Field(Path(".quartet"), description="directory of the embedded server and of caches")

    http_host: str = Field("127.0.0.1", description="address of metrics and health")
    http_port: int = Field(9464, ge=0, le=65535, description="port of metrics and health; 0 is any free one")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    agents: AgentNames = Field(AGENTS, min_length=1, description="agents that are configured, of the known four")
    weights: Annotated[Mapping[str, Weight], _overrides(_DEFAULT_WEIGHTS), Frozen] = Field(
        default_factory=dict, description="weight of each agent's vote, >= 0; need not sum to 1"
    )
    quorum: int = Field(3, ge=1, le=len(AGENTS), description="agreeing agents that a BUY or SELL needs")
    threshold: Annotated[Mapping[str, Share], _overrides(_DEFAULT_THRESHOLD), Frozen] = Field(
        default_factory=dict, description="return above which to BUY, where an artifact's metadata has none"
    )
    residual_std: Annotated[Mapping[str, Positive], _overrides(_DEFAULT_RESIDUAL), Frozen] = Field(
        default_factory=dict, description="residual deviation of the return, where an artifact's metadata has none"
    )
    allow_unscaled: AgentNames = Field((), description="agents that may load without a scaler")
    feature_sets: Annotated[Names, AfterValidator(_known_sets)] = Field(
        (), description="feature sets that are computed even if no agent reads them; v3 always is"
    )
    window_capacity: int = Field(64, ge=1, le=1024, description="ready vectors kept for each symbol, in bars")

    watch_s: Share = Field(2.0, description="seconds between looks at the models folder; 0 never looks")
    canary_share: float = Field(0.10, gt=0, le=0.2, description="share of the weight that a canary takes, 0 to 0.2")
    canary_hours: Positive = Field(6.0, description="hours of bars in which any violation rolls a canary back")

    batch_size: int = Field(256, ge=1, le=1024, description="most bars in one commit")
    lease_s: Positive = Field(2.0, description="seconds after which a silent owner is replaced by its standby")
    deadline_s: Positive = Field(
        2.0, description="seconds without a commit of an agent's own process, while a vector waits, that make it absent"
    )
    retain: int = Field(1_000_000, ge=0, description="entries kept per output stream, roughly; 0 keeps all")

    warmup_bars: Annotated[Mapping[str, int], _overrides(_DEFAULT_WARMUP), Frozen] = Field(
        default_factory=dict, description="bars before a feature set is ready, for each symbol and interval"
    )
    intervals: Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_split)] = Field(
        None, description="intervals that are accepted, such as 1m; all unless set"
    )
    max_bar_age_intervals: Positive | None = Field(
        None, description="age on arrival, in intervals, past which a signal is `stale`; unjudged unless set"
    )
    max_gap_bars: int = Field(100, ge=1, description="missing bars after which a symbol warms up anew")
    max_symbols: int = Field(10_000, ge=1, description="most symbol and interval pairs")
    clock_skew_s: Share = Field(5.0, description="seconds a bar's time may be ahead of the clock")
    frozen_bars: int = Field(30, ge=2, description="equal bars in a row that are flagged `frozen`")
    jump_ratio: Positive = Field(0.5, description="change of the close that is flagged `jump`; 0.5 is 50 %")

    probation: Literal["vote", "shadow"] = Field(
        "vote", description="whether votes of an agent with too few to judge count, or are only recorded"
    )
    quality: Annotated[Mapping[str, QualityLimits], BeforeValidator(read_limits), Frozen] = Field(
        default_factory=dict, description="limits of degenerate votes, for all agents and in tables of single ones"
    )
    ensemble: Annotated[EnsembleLimits, BeforeValidator(read_ensemble_limits)] = Field(
        default_factory=EnsembleLimits, description="bounds of agreement and disagreement, past which an event says so"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003  the signature is the base class's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _probation_is_a_limit_of_all(cls, values: Any) -> Any:
        given = values.get("quality") or {}
        if "probation" not in values or not isinstance(given, Mapping):
            return values
        return {**values, "quality": {"probation": values["probation"], **given}}

    @property
    def input_keys(self) -> tuple[str, ...]:
        """The keys that are read for bars, at least one."""
        return self.bars or (Keys(self.namespace).bars,)

    @field_validator("redis")
    @classmethod
    def _redis_is_a_url(cls, value: str) -> str:
        if value != EMBEDDED and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("expected `embedded` or a URL that begins with redis://, rediss:// or unix://")
        return value

    @field_validator("broker")
    @classmethod
    def _broker_is_a_url(cls, value: str | None) -> str | None:
        if value is not None and not _BROKER.fullmatch(value):
            raise ValueError(f"expected kafka://HOST:PORT, or several HOST:PORT with commas; found {value!r}")
        return value

    @field_validator("namespace")
    @classmethod
    def _namespace_is_plain(cls, value: str) -> str:
        if not _NAMESPACE.fullmatch(value):
            raise ValueError("expected 1 to 128 characters without spaces, control characters or braces")
        return value

    @field_validator("models", "state_dir")
    @classmethod
    def _home_is_expanded(cls, value: Path) -> Path:
        return value.expanduser()

    @field_validator("intervals")
    @classmethod
    def _intervals_have_the_form(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        wrong = [i for i in value or () if not _INTERVAL.fullmatch(i)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: expected a number with s, m, h or d, such as 1m")
        return value

    @field_validator("warmup_bars")
    @classmethod
    def _warmup_covers_the_windows(cls, value: Mapping[str, int]) -> Mapping[str, int]:
        for name, bars in value.items():
            least = FEATURE_SETS[name].longest_window
            if bars < least:
                raise ValueError(f"{name} needs at least {least} bars, its longest window; found {bars}")
        return value

    @model_validator(mode="after")
    def _ensemble_can_decide(self) -> Settings:
        if self.quorum > len(self.agents):
            raise ValueError(
                f"quorum is {self.quorum} but only {len(self.agents)} agents are configured: "
                f"set quorum to {len(self.agents)} or less, or configure more agents"
            )
        if not any(self.weights[agent] for agent in self.agents):
            raise ValueError("weights of the configured agents are all 0: give at least one of them a weight")
        return self

    def describe(self) -> dict[str, Any]:
        """Every setting as plain JSON values, secrets masked."""
        shown = {name: _plain(getattr(self, name)) for name in type(self).model_fields}
        return shown | {name: mask(shown[name]) for name in SECRETS}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return self.describe().items()


def mask(url: str) -> str:
    """`url` with its password, if it has one, replaced by stars; rather too much is hidden than too little."""
    without_login = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", without_login)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (QualityLimits, EnsembleLimits)):
        return asdict(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


Layer = tuple[str, Mapping[str, Any]]
"""Where settings come from, for a person, and the settings that stand there."""


def load(config: Path | None = None, **flags: Any) -> Settings:
    """The settings of this process; flags that are None count as not given.

    `config` is the TOML file; unless given, `QUARTET_CONFIG`, else `./quartet.toml` if it exists.
    Raises `UsageError` in one line that names the setting, what was expected and where it stands.
    """
    return resolve(layers(config, **flags))


def layers(config: Path | None = None, **flags: Any) -> tuple[Layer, ...]:
    """The sources in force, the strongest first."""
    given = {name: value for name, value in flags.items() if value is not None}
    return ("flags", given), ("environment", _environment()), _file(config)


def resolve(sources: tuple[Layer, ...]) -> Settings:
    """Settings from `sources`, the strongest first. Tables such as `weights` are merged entry by entry."""
    merged: dict[str, Any] = {}
    for _, values in reversed(sources):
        for name, value in values.items():
            below = merged.get(name)
            merged[name] = _over(below, value)
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(e, sources) for e in error.errors(include_url=False))) from None


def _over(below: Any, value: Any) -> Any:
    """`value` in place of `below`; of two tables, entry by entry."""
    if not (isinstance(below, Mapping) and isinstance(value, Mapping)):
        return value
    return {**below, **{name: _over(below.get(name), entry) for name, entry in value.items()}}


def _explain(error: Any, sources: tuple[Layer, ...]) -> str:
    """One pydantic error as one clause: the setting, where it stands, what was expected, what was found."""
    path = [str(part) for part in error["loc"]]
    source = next((name for name, values in sources if path and path[0] in values), "settings")
    text = str(error["msg"]).removeprefix("Value error, ")
    if not path:
        return text
    if error["type"] == "extra_forbidden":
        return _unknown(path[0], source, Settings.model_fields)
    found = "" if path[0] in SECRETS or error["type"] == "value_error" else f"; found {error['input']!r}"
    return f"setting {'.'.join(path)} ({source}): {text[:1].lower()}{text[1:]}{found}"


def _unknown(name: str, source: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else "; see `quartet config show` for all of them"
    return f"unknown setting {name} ({source}){hint}"


def _environment() -> dict[str, Any]:
    """The settings among the environment variables."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    files = [f"{PREFIX}{name.upper()}_FILE" for name in SECRETS]
    for name in os.environ:
        ours = name.startswith(PREFIX) and not name.startswith(f"{PREFIX}TEST_") and name != f"{PREFIX}CONFIG"
        if ours and name.partition("__")[0] not in known and name not in files:
            raise UsageError(_unknown(name, "environment", known + files))
    try:
        values = EnvSettingsSource(Settings, env_ignore_empty=True)()
    except SettingsError as error:
        raise UsageError(f"environment: {error}; a table is JSON, or one entry as in QUARTET_WEIGHTS__NHITS") from None
    return values | _secret_files(values)


def _secret_files(values: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SECRETS:
        variable = f"{PREFIX}{name.upper()}_FILE"
        path = os.environ.get(variable)
        if not path:
            continue
        if name in values:
            raise UsageError(f"both {PREFIX}{name.upper()} and {variable} are set: unset one of them")
        try:
            found[name] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{variable}: cannot read {path}: {error}") from None
    return found


def _file(config: Path | None) -> Layer:
    """The TOML file in force; an empty layer where there is none."""
    named = config or (Path(os.environ["QUARTET_CONFIG"]) if os.environ.get("QUARTET_CONFIG") else None)
    if named is None and not DEFAULT_FILE.exists():
        return "file", {}
    path = named or DEFAULT_FILE
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read settings from {path}: {error}") from None
    for name in values:
        if name not in Settings.model_fields:
            raise UsageError(_unknown(name, str(path), Settings.model_fields))
    return str(path), values

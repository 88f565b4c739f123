"""The flags that every command shares, in one place."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_type_hints

import typer

_PANEL = "Shared by every command"


def _flag(kind: Any, name: str, metavar: str, text: str) -> Any:
    return Annotated[kind | None, typer.Option(name, metavar=metavar, help=text, rich_help_panel=_PANEL)]


SHARED = {
    "redis": _flag(str, "--redis", "URL", "Server, or `embedded` for the one of the state directory."),
    "namespace": _flag(str, "--namespace", "NAME", "What every key begins with."),
    "models": _flag(Path, "--models", "DIR", "Directory of the artifacts."),
    "http_port": _flag(int, "--http-port", "PORT", "Port of metrics and health; 0 is any free one."),
    "state_dir": _flag(Path, "--state-dir", "DIR", "Directory of the embedded server and of caches."),
    "config": _flag(Path, "--config", "FILE", "Settings in TOML; ./quartet.toml if it exists."),
}


MORE = {"broker": _flag(str, "--broker", "URL", "Kafka instead of Redis, as kafka://HOST:PORT.")}
"""Flags of settings that some commands have; see `with_settings_and`."""


def with_settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the shared flags and call it with `settings=Settings` made of all sources.

    The command declares a parameter `settings: Settings` and its own flags; a flag of its own whose
    name is that of a shared one stands in for it.
    """
    return _with_shared(command, "settings", _settings)


def with_settings_and(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `with_settings`, with the flags `names` of `MORE` too."""
    return lambda command: _with_shared(command, "settings", _settings, {name: MORE[name] for name in names})


def with_layers(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `with_settings`, for a command that declares `layers` and wants to see each source."""
    return _with_shared(command, "layers", _layers)


def _settings(flags: dict[str, Any]) -> Any:
    from worker.settings import load

    settings = load(**flags)
    use_kernel_cache(settings.state_dir)
    if flags["config"] is not None:
        os.environ["QUARTET_CONFIG"] = str(flags["config"])  # for the programs that this one starts
    return settings


def use_kernel_cache(state_dir: Path) -> None:
    """Keep compiled kernels in the state directory, for every command; before the first import of numba."""
    os.environ.setdefault("NUMBA_CACHE_DIR", str(state_dir.resolve() / "numba"))


def _layers(flags: dict[str, Any]) -> Any:
    from worker.settings import layers

    return layers(**flags)


def _with_shared(
    command: Callable[..., Any],
    name: str,
    make: Callable[[dict[str, Any]], Any],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., Any]:
    hints = get_type_hints(command, include_extras=True)
    own = {
        p.name: p.replace(annotation=hints.get(p.name, p.annotation), kind=inspect.Parameter.KEYWORD_ONLY)
        for p in inspect.signature(command).parameters.values()
        if p.name != name
    }
    shared = {
        flag: inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for flag, kind in {**SHARED, **more}.items()
        if flag not in own
    }

    @functools.wraps(command)
    def wrapper(**given: Any) -> Any:
        flags = {flag: given.pop(flag) for flag in shared}
        return command(**{name: make(flags)}, **given)

    parameters = [*own.values(), *shared.values()]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


Bars = Annotated[
    list[str] | None,
    typer.Option("--bars", metavar="KEY", help="Input key or pattern, such as 'candles-BINANCE-*'; may be repeated."),
]
"""The flag of every command that reads bars from streams; `reading` puts it into the settings."""


def reading(settings: Any, bars: list[str] | None) -> Any:
    """`settings` with the input keys of the flag, where it was given; commas separate keys too."""
    keys = tuple(key.strip() for part in bars or () for key in part.split(",") if key.strip())
    return settings.model_copy(update={"bars": keys}) if keys else settings

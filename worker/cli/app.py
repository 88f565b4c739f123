"""The program `quartet`: its commands, its version, and what a failure looks like.

A command's module is imported only when that command runs, so that help and completion stay quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from worker.errors import UNAVAILABLE, USAGE, expected

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells give it: 128 and the number of SIGINT."""

PIPE_CLOSED = 141
"""The exit code after the reader of our output went away: 128 and the number of SIGPIPE."""

_OURS = frozenset({"worker", "agents", "streams"})

_COMMANDS: tuple[tuple[str, str, str], ...] = (
    ("demo", "worker.cli.demo:demo", "See it work: a synthetic market, four models, one minute."),
    ("run", "worker.cli.run:run", "Serve: bars in, votes and signals out, until SIGTERM."),
    ("check", "worker.cli.check:check", "Say what `run` would do with what is there, without consuming anything."),
    ("feed", "worker.cli.feed:feed", "An exchange's closed bars onto the stream, history first."),
    ("bridge", "worker.cli.bridge:bridge", "Bars from Redis to Kafka, each once, to the partition of its symbol."),
    ("record", "worker.cli.record:record", "Every stream into one file, until Ctrl-C."),
    ("replay", "worker.cli.replay:replay", "A recording or a file of bars again: published, or verified."),
    ("explain", "worker.cli.explain:explain", "One signal: who voted what, who was left out and why."),
    ("top", "worker.cli.top:top", "A live view of a running worker: who votes, who does not and why."),
    ("gate", "worker.cli.gate:gate", "The quality gate over an agent's votes: PASS, FAIL or INSUFFICIENT."),
    ("train", "worker.cli.train:train", "Train agents on a file of bars."),
    ("models", "worker.cli.models:app", "Look at the artifacts and steer the agents."),
    ("config", "worker.cli.config:app", "Show and check the settings."),
)
"""Name, `module:attribute` (a function or a `typer.Typer`), and the line in the overview."""


class _Later(TyperCommand):
    """A command by name and one line of help, whose module is not imported yet."""

    def __init__(self, name: str, target: str, text: str) -> None:
        super().__init__(name, help=text)
        self.target = target

    def load(self) -> Any:
        module, _, attribute = self.target.partition(":")
        found: Callable[..., Any] | typer.Typer = getattr(importlib.import_module(module), attribute)
        group = found if isinstance(found, typer.Typer) else _alone(found)
        group._add_completion = False  # noqa: SLF001  completion is installed once, by the program itself
        command = typer.main.get_command(group)
        command.name = self.name
        return command


def _alone(function: Callable[..., Any]) -> typer.Typer:
    app = typer.Typer()
    app.command()(function)
    return app


class _Program(TyperGroup):
    """A group that lists its commands without importing them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, target, text in _COMMANDS:
            self.add_command(_Later(name, target, text))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, _Later) else command, rest


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version_line() -> str:
    """The program's version and the first 12 digits of v3's contract hash."""
    from streams.contracts import V3

    try:
        number = version("quartet-worker")
    except PackageNotFoundError:
        number = "not installed"
    return f"quartet {number} (features v3 {V3.contract[:12]})"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_line())
        raise typer.Exit


@app.callback()
def quartet(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Market bars on a Redis stream become features, votes of four models, and signals that cannot lie."""


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; an expected failure is one line on stderr."""
    try:
        result = app(args=arguments, prog_name="quartet", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away, as in `quartet ... | head`; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (Exception, SystemExit) as error:  # noqa: BLE001  what is not expected is raised again
        return _failure(error)
    return result if type(result) is int else 0


def _failure(error: BaseException) -> int:
    """The exit code of a failure after saying it in one line; what nobody foresaw is raised again."""
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, BrokenPipeError):
            return PIPE_CLOSED
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, typer.Abort):
        return INTERRUPTED
    if hasattr(error, "format_message"):  # the command line's own errors, whatever class the library gives them
        text = error.format_message()
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "quartet"
        return _say(f"{text.rstrip('.')}; see `{path} --help`" if text else "", getattr(error, "exit_code", USAGE))
    known = expected(error)
    if known is not None:
        return _say(str(known), known.exit_code)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OURS:
        return _say(f"the module {error.name} is not installed; install the extra that carries it", UNAVAILABLE)
    raise error


def _say(text: str, code: int) -> int:
    if text:
        print("error: " + " ".join(text.split()), file=sys.stderr)
    return code

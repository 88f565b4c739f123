"""Expected failures, and the exit code of each: one line on stderr, never a traceback."""

from __future__ import annotations

CHECK_FAILED = 1
USAGE = 2
UNAVAILABLE = 3
FENCED = 75
"""The exit codes of every command; 75 is EX_TEMPFAIL of sysexits(3)."""


class QuartetError(Exception):
    """A failure that was foreseen. Its text names the thing and the remedy, in one line."""

    exit_code = CHECK_FAILED


class CheckFailed(QuartetError):
    """A check was made and did not pass."""


class UsageError(QuartetError):
    """A flag, a setting or a file of the user's is wrong."""

    exit_code = USAGE


class Unavailable(QuartetError):
    """Something this program needs is not there: a server, a port, a device."""

    exit_code = UNAVAILABLE


class FencedOff(QuartetError):
    """Another instance owns the namespace; nothing was written."""

    exit_code = FENCED


def expected(error: BaseException, server: str = "") -> QuartetError | None:
    """The `QuartetError` that `error` amounts to, or None where it is a defect of ours.

    `server` is the URL that was tried, without its password. The layers below know nothing of exit codes, so their
    errors are translated here and only here.
    """
    if isinstance(error, QuartetError):
        return error
    # Only a failure pays for these imports.
    import redis  # noqa: PLC0415

    from agents.agent import Refused  # noqa: PLC0415
    from streams import codec, store  # noqa: PLC0415
    from streams.embedded import EmbeddedError  # noqa: PLC0415

    text, at = str(error), f" at {server}" if server else ""
    if isinstance(error, store.FencedError):
        return FencedOff(text)
    unreachable = (redis.ConnectionError, redis.TimeoutError)  # a refused login is one of them
    if isinstance(error, store.StoreUnavailableError) and isinstance(error.__cause__, unreachable):
        error = error.__cause__
    if isinstance(error, EmbeddedError | store.StoreUnavailableError):
        return Unavailable(text)
    if isinstance(error, redis.AuthenticationError):
        return Unavailable(f"Redis{at} refused the login: {text}; check the user and password in --redis")
    if isinstance(error, unreachable):
        return Unavailable(f"Redis{at} is not reachable: {text.rstrip('.')}; check --redis and that the server runs")
    if isinstance(
        error, store.InputLostError | store.RewoundError | store.StoreMisuseError | codec.StateCorruptError | Refused
    ):
        return CheckFailed(text)
    return None

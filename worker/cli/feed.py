"""`quartet feed`: an exchange's bars onto the stream."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.options import with_settings
from worker.errors import UsageError
from worker.settings import Settings

if TYPE_CHECKING:
    from worker.feed.session import Progress


@with_settings
def feed(
    settings: Settings,
    exchange: Annotated[str, typer.Option(metavar="NAME", help="The exchange, as ccxt names it: binance, kraken, ...")],
    symbols: Annotated[str, typer.Option(metavar="LIST", help="Symbols joined by commas: BTC/USDT,ETH/USDT.")],
    interval: Annotated[str, typer.Option(metavar="N[smhd]", help="Length of a bar.")] = "1m",
    history: Annotated[int, typer.Option(min=0, help="Bars to begin with, for a symbol that has none yet.")] = 300,
    maxlen: Annotated[
        int, typer.Option(min=0, help="Entries kept on the stream, roughly; 0 keeps all, until memory ends.")
    ] = 1_000_000,
    options: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON given to the exchange's class: proxies, urls, ...")
    ] = None,
) -> None:
    """Publish an exchange's closed bars: history first, then live, filling every gap, until SIGTERM."""
    from streams.inputs import Inputs
    from streams.keys import Keys
    from streams.redis import RedisStore
    from worker.assembly import open_client, server_url
    from worker.feed.exchange import open_exchange
    from worker.logs import make_logger

    wanted = tuple(dict.fromkeys(name.strip() for name in symbols.split(",") if name.strip()))
    if not wanted:
        raise UsageError("--symbols names none; give some, as in --symbols BTC/USDT,ETH/USDT")
    config = _read_options(options)
    named = Inputs(settings.input_keys, settings.namespace).named
    keys = Keys(settings.namespace)
    log = make_logger(settings.log_level)

    async def main() -> None:
        from worker.feed.exchange import check_request, close_exchange
        from worker.feed.publisher import Publisher
        from worker.feed.session import Plan, SymbolFeed, run_feed

        opened = open_exchange(exchange, config)
        try:
            await check_request(opened, wanted, interval)
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            with server_url(settings, start=True) as url, _progress() as progress:
                store = RedisStore(open_client(url), keys)
                key = named[0] if named else keys.bars
                publisher = Publisher(store, key, wanted, interval, maxlen or None)
                log.info("feeding", exchange=exchange, symbols=len(wanted), interval=interval, key=key)
                await run_feed([SymbolFeed(opened, publisher, s, Plan(history), log, progress) for s in wanted], stop)
        finally:
            await close_exchange(opened)

    asyncio.run(main())


def _read_options(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import json

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read --options {path}: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"--options {path} holds a {type(value).__name__}, a JSON object was expected")
    return value


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars of history on a terminal, a line for each symbol, gone once they are full."""
    from rich.console import Console
    from rich.progress import Progress as Shown

    with Shown(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as shown:
        tasks: dict[str, Any] = {}

        def progress(symbol: str, done: int, total: int) -> None:
            if symbol not in tasks:
                tasks[symbol] = shown.add_task(symbol)
            shown.update(tasks[symbol], completed=done, total=total, visible=done < total)

        yield progress

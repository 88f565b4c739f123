"""Give one order to the running worker, and read its answer among the events."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.artifacts import LoadOptions
from agents.discovery import PATTERN, candidate_of, read_once
from streams.keys import FEATURES, Keys
from streams.store import FIRST_ID
from worker.control import Order
from worker.errors import UsageError

POLL_MS = 200
REFUSALS = ("order_refused", "reload_refused")
"""Events that say that an order was not carried out."""

KEEP_ORDERS = 10_000


def order_for(order: str, agent: str, file: Path | None, models: Path) -> Order:
    """The order; a file inside `models` is named as the worker finds it there, another by its whole path.

    Raises `UsageError` where there is no such file or its name is not one of the agent's, `Refused` where it
    cannot be read.
    """
    by = f"{_user()}@{os.uname().nodename}"
    if file is None:
        return Order(order, agent, by=by)
    if not file.exists():
        raise UsageError(f"{file} is not there; name the model file, its scaler beside it")
    if candidate_of(file, agent) is None:
        raise UsageError(f"{file.name} is not the name of an artifact of {agent}: expected {PATTERN}")
    inside = file.resolve().parent == models.resolve()
    sha256 = hashlib.sha256(read_once(file, LoadOptions().max_bytes)).hexdigest()
    return Order(order, agent, file.name if inside else str(file.resolve()), sha256, by)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a numeric user without a name, as in containers
        return str(os.getuid())


def give(client: Any, keys: Keys, order: Order) -> tuple[str, str]:
    """Write the order; its ID, and the ID of the last event before it."""
    last = client.xrevrange(keys.events, count=1)
    entry_id = client.xadd(keys.control, {"data": order.encode()}, maxlen=KEEP_ORDERS, approximate=True)
    return str(entry_id.decode()), last[0][0].decode() if last else FIRST_ID


def answering(client: Any, keys: Keys, order: Order, agents: Sequence[str]) -> frozenset[str]:
    """The agents whose processes each answer an order: all of them, where stages run and it names none."""
    alone = order.agent or not client.exists(keys.owner(FEATURES))
    return frozenset() if alone else frozenset(agents)


def answers(
    client: Any, keys: Keys, order_id: str, after: str, wait_s: float, agents: frozenset[str] = frozenset()
) -> list[dict[str, Any]]:
    """The events that answer an order, all of one commit; none where no worker answers within `wait_s`.

    Where `agents` answer each for themselves, as many as did within that time.
    """
    deadline = time.monotonic() + wait_s
    all_found: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        for _, entries in client.xread({keys.events: after}, count=1000, block=POLL_MS) or ():
            after = entries[-1][0].decode()
            events = [json.loads(fields[b"data"]) for _, fields in entries]
            all_found += [event for event in events if event["evidence"].get("order") == order_id]
            if all_found and agents <= {event["agent"] for event in all_found}:
                return all_found
    return all_found

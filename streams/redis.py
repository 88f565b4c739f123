"""Redis and Valkey: read a batch, commit it behind a fence, stand by for another instance.

The epoch in the owner hash is the fence: taking over increments it, and a commit with an older one
writes nothing. The lease only says who is alive. No write is ever retried blindly: after a lost
reply the stored position tells whether the commit was applied. It begins with the commit's number,
so that a commit that moves no input is told apart from its predecessor too.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from operator import itemgetter
from typing import Any

import msgpack
import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)
from redis.retry import Retry

from streams.keys import CHAIN, Keys
from streams.messages import Entry
from streams.store import (
    FIRST_ID,
    GONE,
    Batch,
    Commit,
    Committed,
    FencedError,
    InputPosition,
    Position,
    RewoundError,
    Snapshot,
    StoreMisuseError,
    StoreUnavailableError,
    StreamFacts,
    check_input,
    id_tuple,
)

OLDEST_SERVER = (7, 0)
_AWAY = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, OutOfMemoryError, ReadOnlyError)
_CANNOT_WRITE = ("MISCONF", "OOM", "READONLY", "NOREPLICAS", "LOADING", "MASTERDOWN", "UNKILLABLE", "BUSY")

# Take the lease if it is free or ours, and make everybody else's commits void. `found` is how the one
# before ended; it survives a second call by the same instance, whose first reply was lost.
_ACQUIRE = """
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] then return 0 end
local owner = redis.call('HMGET', KEYS[1], 'instance', 'clean', 'found')
local found = owner[2] or '1'
if owner[1] == ARGV[1] then found = owner[3] or '1' end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
redis.call('HSET', KEYS[1], 'instance', ARGV[1], 'clean', '0', 'found', found)
local epoch = redis.call('HINCRBY', KEYS[1], 'epoch', 1)
return {tostring(epoch), found}
"""

# Keep the lease; where it ran out and nobody took it, take it again.
_RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

_RELEASE = """
local owner = redis.call('HMGET', KEYS[1], 'epoch', 'instance')
if owner[1] == ARGV[2] and owner[2] == ARGV[1] then redis.call('HSET', KEYS[1], 'clean', '1') end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
return 1
"""

# Note which entry is about to be processed alone; how many instances noted it, one after another.
_MARK = """
local owner = redis.call('HMGET', KEYS[1], 'epoch', 'instance', 'marked', 'marked_by', 'marks')
if owner[1] ~= ARGV[1] or owner[2] ~= ARGV[3] then return -1 end
local marks = 1
if owner[3] == ARGV[2] then
  marks = tonumber(owner[5])
  if owner[4] ~= ARGV[3] then marks = marks + 1 end
end
redis.call('HSET', KEYS[1], 'marked', ARGV[2], 'marked_by', ARGV[3], 'marks', marks)
return marks
"""

_UNMARK = """
local owner = redis.call('HMGET', KEYS[1], 'epoch', 'instance')
if owner[1] == ARGV[1] and owner[2] == ARGV[2] then redis.call('HSET', KEYS[1], 'marked', '') end
return 1
"""


def connect(url: str, *, timeout_s: float = 5.0) -> redis.Redis:
    """A client that never retries by itself: a write that is run twice would be worse than an error."""
    return redis.Redis.from_url(
        url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        retry_on_timeout=False,
        socket_connect_timeout=timeout_s,
        socket_timeout=timeout_s,
        health_check_interval=0,
    )


def check_server(client: redis.Redis) -> str:
    """The server's version. Raises `StoreMisuseError` on a server that cannot keep the promises."""
    info = _guarded(client.info)
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        raise StoreMisuseError(f"the server is version {version}: Redis 7 or newer, or Valkey, is needed")
    if info.get("redis_mode") == "cluster":
        raise StoreMisuseError("the server is a Redis Cluster, which is not supported: a commit spans several keys")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreMisuseError(
            f"maxmemory-policy is {policy}, which can drop state: set it to noeviction on the server"
        )
    return version


def _guarded(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a command; an unreachable or unwilling server is `StoreUnavailableError`."""
    try:
        return call(*args, **kwargs)
    except _AWAY as error:
        raise StoreUnavailableError(str(error), _reason(error)) from error
    except ResponseError as error:
        if str(error).startswith(_CANNOT_WRITE):
            raise StoreUnavailableError(str(error), _reason(error)) from error
        if "WRONGTYPE" in str(error):
            raise StoreMisuseError(
                f"a key of this namespace holds something else ({error}): use another --namespace or delete the key"
            ) from error
        raise


def _reason(error: Exception) -> str:
    """Why the server is of no use now, as in `StoreUnavailableError.reason`."""
    if isinstance(error, OutOfMemoryError):
        return "out_of_memory"
    if isinstance(error, ReadOnlyError):
        return "read_only"
    if isinstance(error, ResponseError):
        return "unavailable" if str(error).startswith("MASTERDOWN") else "error"
    return "unavailable"


class RedisStore:
    """One stage of one namespace on a server. Needs `acquire` before `commit`.

    The parts of the state of `chain`, all stages in one, are kept under their names, those of any other stage
    under `<stage>:<part>`.
    """

    def __init__(
        self, client: redis.Redis, keys: Keys, stage: str = CHAIN, *, lease_s: float = 2.0, retain: int = 1_000_000
    ) -> None:
        self.client = client
        self.keys = keys
        self.stage = stage
        self.instance = uuid.uuid4().hex
        self.epoch = 0
        self.was_clean = True
        self._lease_ms = max(1, round(lease_s * 1000))
        self._retain = retain
        self._committed = b""
        self._commits = 0
        self._busy = 0
        self._script = files("streams").joinpath("commit.lua").read_text("utf-8")
        self._sha: str | None = None
        self._keys = (keys.owner(stage), keys.lease(stage))

    def state_key(self, part: str) -> str:
        """The key of a part of this stage's state."""
        return self.keys.state(part, self.stage)

    def acquire(self) -> bool:
        """Become the owner unless another instance is alive; makes every other's commits void."""
        reply = _guarded(self.client.eval, _ACQUIRE, 2, *self._keys, self.instance, self._lease_ms)
        if reply == 0:
            return False
        self.epoch, self.was_clean = int(reply[0]), reply[1] == b"1"
        return True

    def renew(self) -> bool:
        """Keep the lease alive. For a thread with a client of its own: see `with_client`."""
        return bool(_guarded(self.client.eval, _RENEW, 1, self._keys[1], self.instance, self._lease_ms))

    def with_client(self, client: redis.Redis) -> RedisStore:
        """The same instance over another connection."""
        twin = RedisStore(client, self.keys, self.stage, lease_s=self._lease_ms / 1000, retain=self._retain)
        twin.instance, twin.epoch = self.instance, self.epoch
        return twin

    def release(self) -> None:
        """Say that this end was clean and let a standby take over at once."""
        _guarded(self.client.eval, _RELEASE, 2, *self._keys, self.instance, str(self.epoch))

    def mark(self, entry: Entry) -> int:
        """Note that `entry` is about to be processed alone; how many instances in a row noted just that."""
        marked = f"{entry.key} {entry.id}"
        count = int(_guarded(self.client.eval, _MARK, 1, self._keys[0], str(self.epoch), marked, self.instance))
        if count < 0:
            raise FencedError(self._fenced("another epoch"))
        return count

    def unmark(self) -> None:
        """Take the mark back: the entry is not processed yet, so a death has another reason."""
        _guarded(self.client.eval, _UNMARK, 1, self._keys[0], str(self.epoch), self.instance)

    def load(self, parts: Sequence[str]) -> Snapshot:
        """Position and state in one transaction. Raises `FencedError` or `RewoundError` where this is not the owner."""
        pipe = self.client.pipeline(transaction=True)
        pipe.hmget(self._keys[0], "epoch", "instance", "position")
        for part in parts:
            pipe.hgetall(self.state_key(part))
        (epoch, instance, stored), *state = _guarded(pipe.execute)
        self._check_owner(epoch, instance)
        self._committed = stored or b""
        committed = Committed.decode(self._committed)
        self._commits = committed.commits
        return Snapshot(committed.position, dict(zip(parts, state, strict=True)))

    def read(self, position: Position, keys: Sequence[str], count: int) -> Batch:
        """Entries after `position` by their IDs, at most `count`, and the facts of each stream, at one moment.

        Of thousands of keys only a few entries each are asked for, as many as are likely to be of use: those are the
        next of all keys up to where the first of them was cut off. Raises what `read_each` does.
        """
        if len(keys) == 1:
            return self.read_each(position, keys, count)
        most = min(count, max(2, 2 * count // max(1, self._busy or len(keys))))
        batch = self.read_each(position, keys, most)
        found = Counter(entry.key for entry in batch.entries)
        self._busy = len(found)
        ends = {entry.key: id_tuple(entry.id) for entry in batch.entries if found[entry.key] == most}
        upto = min(ends.values(), default=None)
        numbered = sorted(((id_tuple(entry.id), entry) for entry in batch.entries), key=itemgetter(0))
        return replace(batch, entries=[entry for at, entry in numbered[:count] if upto is None or at <= upto])

    def read_each(self, position: Position, keys: Sequence[str], count: int, stages: Sequence[str] = ()) -> Batch:
        """At most `count` entries of each key after `position`, key by key, and the facts of each, at one moment.

        At that moment too, how far other `stages` of the namespace are.
        Raises `InputLostError` where an input no longer holds what follows the position, but first what
        `commit` would raise: a server that went back in time has lost input too.
        """
        pipe = self.client.pipeline(transaction=True)
        pipe.hmget(self._keys[0], "epoch", "instance", "position")
        pipe.time()
        for stage in stages:
            pipe.hmget(self.keys.owner(stage), "position")
        for key in keys:  # not decoded by the client: that takes twice as long, and there may be thousands
            pipe.execute_command("XINFO", "STREAM", key)  # type: ignore[no-untyped-call]
        pipe.xread({key: _after(position, key) for key in keys}, count=count)
        (epoch, instance, stored), (seconds, micros), *told, streams = _guarded(pipe.execute, raise_on_error=False)
        positions, infos = told[: len(stages)], told[len(stages) :]
        self._check_owner(epoch, instance)
        if self.epoch and (stored or b"") != self._committed:
            raise RewoundError(self._rewound(epoch, stored))
        facts = {key: _facts(key, info) for key, info in zip(keys, infos, strict=True)}
        known = {key: fact for key, fact in facts.items() if fact is not None}
        for key in keys:
            if key in position.inputs:
                check_input(key, position.inputs[key], known.get(key, GONE))
        if isinstance(streams, Exception):
            raise _translated(streams)
        committed = {stage: Committed.decode(said or b"") for stage, (said,) in zip(stages, positions, strict=True)}
        return Batch(_entries(streams), known, seconds * 1000 + micros // 1000, committed)

    def wait(self, position: Position, keys: Sequence[str], timeout_s: float) -> bool:
        """Block until an entry follows `position`, at most `timeout_s` seconds."""
        after = {key: _after(position, key) for key in keys}
        return bool(_guarded(self.client.xread, after, count=1, block=max(1, round(timeout_s * 1000))))

    def commit(self, commit: Commit) -> bool:
        """One atomic commit; safe to call again with the same one after `StoreUnavailableError`.

        False where an earlier try was applied and only its reply was lost.
        """
        following = b"%d %s" % (self._commits + 1, commit.position.encode())
        keys, packed = self._packed(commit)
        reply = self._run_commit(keys, following, packed)
        if reply[0] == b"MOVED":
            self._judge_move(reply[1], reply[2], reply[3], following)
        elif reply[0] != b"OK":
            raise StoreMisuseError(_misuse(reply))
        self._committed = following
        self._commits += 1
        return bool(reply[0] == b"OK")

    def _run_commit(self, keys: Sequence[str], following: bytes, packed: bytes) -> list[bytes]:
        arguments = (len(keys), *keys, str(self.epoch), self._committed, following, packed, self.instance)
        if self._sha is None:
            self._sha = _guarded(self.client.script_load, self._script)
        try:
            return _guarded(self.client.evalsha, self._sha, *arguments)  # type: ignore[no-any-return]
        except NoScriptError:
            self._sha = _guarded(self.client.script_load, self._script)
            return _guarded(self.client.evalsha, self._sha, *arguments)  # type: ignore[no-any-return]

    def _judge_move(self, epoch: bytes, stored: bytes, instance: bytes, following: bytes) -> None:
        """Tell apart why the server's position is not the one that this batch starts from."""
        self._check_owner(epoch, instance)
        if stored != following:  # else an earlier try was applied and its reply lost
            raise RewoundError(self._rewound(epoch, stored))

    def _check_owner(self, epoch: bytes | None, instance: bytes | None) -> None:
        """Raise `FencedError` where another instance took over, `RewoundError` where the server forgot us."""
        if not self.epoch:
            return
        stored = int(epoch or 0)
        if stored > self.epoch or (stored == self.epoch and instance != self.instance.encode()):
            raise FencedError(self._fenced(epoch))
        if stored < self.epoch:
            raise RewoundError(self._rewound(epoch, None))

    def _packed(self, commit: Commit) -> tuple[list[str], bytes]:
        """The keys of the script, the owner first, and the batch with keys as numbers."""
        numbers: dict[str, int] = {self._keys[0]: 1}

        def number(key: str) -> int:
            return numbers.setdefault(key, len(numbers) + 1)

        outputs = [[number(o.key), self._retain, o.ids, o.payloads] for o in commit.outputs if o.ids]
        appends = [[number(key), self._retain, rows] for key, rows in commit.appends.items() if rows]
        hashes = [
            [number(self.state_key(part)), [x for pair in fields for x in pair]]
            for part, fields in commit.state.items()
            if fields
        ]
        drops = [number(self.state_key(part)) for part in commit.drops]
        packed: bytes = msgpack.packb([outputs, appends, hashes, drops], use_bin_type=False)
        return list(numbers), packed

    def _fenced(self, epoch: Any) -> str:
        return (
            f"another instance took over {self.keys.namespace}:{self.stage} "
            f"(its epoch is {epoch!r}, ours {self.epoch}); nothing was written"
        )

    def _rewound(self, epoch: Any, stored: Any) -> str:
        return (
            f"the server holds an earlier position than was committed (epoch {epoch!r}, ours {self.epoch}; position "
            f"{stored!r}): it lost its latest writes"
        )

    def append(self, key: str, entries: Iterable[dict[Any, Any]], *, maxlen: int | None = None) -> None:
        """Publish entries with IDs made by the server: for feeds and replays, not for stages."""
        pipe = self.client.pipeline(transaction=False)
        for fields in entries:
            pipe.xadd(key, fields, maxlen=maxlen, approximate=True)
        _guarded(pipe.execute)

    def part(self, name: str) -> dict[bytes, bytes]:
        """One part of the state, for who does not own the stage."""
        return _guarded(self.client.hgetall, self.state_key(name))  # type: ignore[no-any-return]

    def tail(self, key: str, before: str, count: int) -> list[tuple[str, dict[bytes, bytes]]]:
        """At most `count` entries of a stream from the newest on; `before` is an ID, `(` excluding it, or `+`."""
        rows = _guarded(self.client.xrevrange, key, max=before, count=count)
        return [(entry_id.decode(), fields) for entry_id, fields in rows]

    def find(self, pattern: str) -> dict[str, str]:
        """The keys that match a glob, each with its type. Names that are not UTF-8 are left out."""
        return _guarded(find_keys, self.client, pattern)  # type: ignore[no-any-return]

    def lengths(self, keys: Sequence[str]) -> dict[str, int]:
        """Entries in each stream."""
        pipe = self.client.pipeline(transaction=False)
        for key in keys:
            pipe.xlen(key)
        return dict(zip(keys, _guarded(pipe.execute), strict=True))


def find_keys(client: redis.Redis, pattern: str) -> dict[str, str]:
    """As `RedisStore.find`, for who owns no stage. Walks the key space, a thousand keys a call."""
    names = sorted({name for name in client.scan_iter(pattern, count=1000) if _is_text(name)})
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.type(name)
    return {name.decode(): kind.decode() for name, kind in zip(names, pipe.execute(), strict=True)}


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _after(position: Position, key: str) -> str:
    known = position.inputs.get(key)
    return known.id if known else FIRST_ID


def _facts(key: str, info: Any) -> StreamFacts | None:
    """Facts of one stream; None where it does not exist yet."""
    if isinstance(info, Exception):
        if "no such key" in str(info):
            return None
        raise _translated(info, key)
    said = dict(zip(info[::2], info[1::2], strict=True))
    first = said[b"first-entry"]
    first_id = first[0].decode() if first else FIRST_ID
    return StreamFacts(said[b"length"], said[b"entries-added"], said[b"last-generated-id"].decode(), first_id)


def _translated(error: Exception, key: str = "") -> Exception:
    if "WRONGTYPE" in str(error):
        return StoreMisuseError(f"input {key or 'key'} is not a stream: name another with --bars, or delete it")
    return error


def _entries(streams: Any) -> list[Entry]:
    """The entries of all inputs, key by key."""
    return [Entry(key.decode(), entry_id.decode(), fields) for key, rows in streams or () for entry_id, fields in rows]


def _misuse(reply: list[bytes]) -> str:
    kind, key, *rest = (part.decode(errors="replace") for part in reply)
    if kind == "TYPE":
        return f"key {key} holds a {rest[0]}, not what this program writes: rename the namespace or delete the key"
    return (
        f"stream {key} ends at {rest[0]}, past the next output {rest[1]}: another program writes to it, or the input "
        "was recreated; use another --namespace, or delete the outputs and the state to start again"
    )


def with_baseline(position: Position, facts: Mapping[str, StreamFacts]) -> Position:
    """The position with an entry for every input that was met for the first time.

    What was trimmed from it before it was met is not this stage's loss.
    """
    new = {k: InputPosition(FIRST_ID, f.added - f.length) for k, f in facts.items() if k not in position.inputs}
    return Position({**position.inputs, **new}, position.last_output_id) if new else position

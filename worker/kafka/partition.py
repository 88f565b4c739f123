"""The worker of one partition: the same loop as on Redis, in a thread of its own, over a `PartitionStore`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from structlog.typing import FilteringBoundLogger

from streams.codec import StateCorruptError
from streams.store import StoreUnavailableError
from worker.assembly import pipeline_factory
from worker.errors import CheckFailed
from worker.kafka.levels import Levels
from worker.kafka.shelf import SharedShelf
from worker.kafka.store import PartitionStore
from worker.lease import LeaseKeeper
from worker.processes.base import Options
from worker.roster import records_of
from worker.sensors import Sensors
from worker.service import Worker
from worker.settings import Settings
from worker.status import Status

LEASE_LOOK_S = 60.0


@dataclass(frozen=True)
class Shared:
    """What the partitions of one process have in common."""

    settings: Settings
    shelf: SharedShelf
    levels: Levels
    log: FilteringBoundLogger


class Partition:
    """Runs until `stop`. Whatever ends it otherwise is handed to `failed`, in its thread."""

    def __init__(
        self,
        number: int,
        store: PartitionStore,
        shared: Shared,
        options: Options,
        failed: Callable[[BaseException], None],
    ) -> None:
        self.number = number
        self.store = store
        self.status = Status(shared.settings.agents, shared.settings.quorum)
        self._shared = shared
        self._options = options
        self._failed = failed
        self._log = shared.log.bind(partition=number)
        self._thread = threading.Thread(target=self._run, name=f"partition-{number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end after the batch in hand."""
        self._options.stop.set()

    def reload(self) -> None:
        """Load every agent's newest artifact, as the order does."""
        self._options.reload.set()

    def join(self) -> None:
        self._thread.join()

    @property
    def accepts_gap(self) -> bool:
        """Whether input that is gone would be accepted: only where that was asked for, until the first read."""
        return self._options.accept_gap

    def stalled_s(self) -> float:
        """For how long a write has been waiting for its answer; 0 while none does."""
        since = self.store.writing_since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        try:
            self._serve()
        except StateCorruptError as error:
            self._failed(explained(self.number, error, self._shared.settings.namespace))
        except StoreUnavailableError as error:
            if not self._options.stop.is_set():
                self._failed(error)
            self._log.warning("stopped without its last commit; the same bars come again", detail=str(error))
        except BaseException as error:  # noqa: BLE001  the process ends with it
            self._failed(error)

    def _serve(self) -> None:
        shared, store = self._shared, self.store
        records = records_of(store.load(("agents",)).state["agents"])
        worker = Worker(
            shared.settings,
            store,
            pipeline_factory(shared.settings),
            shared.shelf,
            records,
            sensors=Sensors(shared.levels.of(self.number)),
            status=self.status,
            log=self._log,
            options=self._options,
        )
        try:
            worker.run(LeaseKeeper(store.renew, lambda: self.status.heartbeat, LEASE_LOOK_S, self._log))
        finally:
            worker.pipeline.voting.close()


def explained(number: int, error: StateCorruptError, namespace: str) -> CheckFailed:
    """What to do on Kafka about state that cannot be trusted."""
    from worker.kafka.topics import changelog_of  # noqa: PLC0415  aiokafka, for a failure only

    return CheckFailed(
        f"partition {number}: {str(error).partition(';')[0]}; the stored state cannot be trusted. Stop every worker, "
        f"delete the topic {changelog_of(namespace)} and the group {namespace}, and start again: every bar that "
        f"{namespace}.bars still holds is computed anew"
    )


def statuses(partitions: Mapping[int, Partition]) -> dict[int, Status]:
    """Each partition's status, by its number."""
    return {number: partition.status for number, partition in partitions.items()}

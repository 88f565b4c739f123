"""Every key name, in one place. A key is `<namespace>:<suffix>`; none carries a hash tag."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_NAMESPACE = "quartet"

CHAIN = "chain"
"""The name, among owners, of all stages in one process."""
FEATURES = "features"
CONSENSUS = "consensus"
AGENT = "agent:"
"""What the stage of an agent begins with."""


def agent_stage(agent: str) -> str:
    """The name of the stage of one agent."""
    return AGENT + agent


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one namespace."""

    namespace: str = DEFAULT_NAMESPACE

    def _key(self, *parts: str) -> str:
        return ":".join((self.namespace, *parts))

    @property
    def bars(self) -> str:
        return self._key("bars")

    @property
    def features(self) -> str:
        return self._key("features")

    def votes(self, agent: str) -> str:
        return self._key("votes", agent)

    @property
    def signals(self) -> str:
        return self._key("signals")

    @property
    def rejected(self) -> str:
        return self._key("rejected")

    @property
    def events(self) -> str:
        return self._key("events")

    @property
    def control(self) -> str:
        return self._key("control")

    def owner(self, stage: str) -> str:
        """Hash: who may commit (`epoch`), and how far that is (`position`)."""
        return self._key("owner", stage)

    def lease(self, stage: str) -> str:
        """Text with a time to live: the instance that is alive; a standby waits for it to end."""
        return self._key("lease", stage)

    def state(self, part: str, stage: str = CHAIN) -> str:
        """Hash: one part of the packed state of a stage, one field a row."""
        return self._key("state", part) if stage == CHAIN else self._key("state", stage, part)

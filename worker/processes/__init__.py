"""The processes of `quartet run`: each drives stages over a store.

`worker.service` chains all stages in one; `features`, `agent` and `consensus` run one stage each over the
same streams. What they all need is in `base`.
"""

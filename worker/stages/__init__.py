"""The three stages of the way of a bar: features, agents, consensus.

Each is a plain object: a batch in, a batch out, no I/O and no clock, with the `changes` of its own parts of
the state and their `restore`. `worker.pipeline.Pipeline` chains them in one process.
"""

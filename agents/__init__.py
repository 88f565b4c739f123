"""The model stages: one model family a file, behind one protocol. Imports `streams` only."""

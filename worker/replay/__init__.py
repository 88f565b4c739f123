"""Recordings and files of bars, run again: published to a stream, or computed in memory and compared."""

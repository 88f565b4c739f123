"""Every number that README quotes, measured again by one command: `python -m benchmarks`."""

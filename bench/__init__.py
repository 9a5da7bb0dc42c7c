"""Benchmarks: ``pytest bench/ --benchmark-only`` times every op beside its peers, in one run."""

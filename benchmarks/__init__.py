"""Benchmarks; run `python -m benchmarks.NAME` in the root of the repository."""

"""Benchmarks behind `joint-controller bench`: each prints one table and measures its baseline in the same run."""

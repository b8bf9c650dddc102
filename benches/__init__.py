"""Benchmarks; each checks correctness first."""

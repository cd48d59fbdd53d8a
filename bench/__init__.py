"""Benchmarks: measured side by side with `vllm serve` in one run, never part of the tests."""

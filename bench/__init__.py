"""Benchmarks, most of which compare the worker with `vllm serve` in the same run. The tests do not run them."""

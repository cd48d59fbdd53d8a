"""The same requests to `vllm serve` and to the worker. The responses must be the same."""

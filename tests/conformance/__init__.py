"""The same requests to vLLM's own server and to the worker: what comes back must be the same."""

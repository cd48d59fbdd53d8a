"""Any vLLM model on RunPod: jobs and HTTP requests answered by an engine in this process."""

__version__ = "0.2.0"

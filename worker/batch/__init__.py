"""Batches: a file of requests in OpenAI's format, answered line by line. This room knows neither engine nor queue."""

"""Fuzzing of what reads callers' words: `jobs.parse`, `stream_form` and the events of a stream."""

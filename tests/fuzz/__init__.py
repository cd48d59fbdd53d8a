"""Fuzzing of everything that parses input from outside: a job's input, and the events of a stream."""

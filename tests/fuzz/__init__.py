"""Fuzzing of all input from outside: jobs, bodies, streams, media files and addresses; and of texts with secrets."""

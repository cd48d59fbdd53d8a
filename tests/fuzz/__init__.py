"""Fuzzing of all input from outside: jobs, bodies, streams, media files, addresses, and texts that contain secrets."""

"""Images, videos and audio from untrusted sources: fetched, checked, and, for videos, decoded in child processes."""

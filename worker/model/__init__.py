"""The model before it runs: its files, whether it fits, and what has been compiled for it before."""

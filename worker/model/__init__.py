"""The model's files: finding and downloading them, checking that they fit the GPUs, and the compile cache."""

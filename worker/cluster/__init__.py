"""Several machines as one worker: the role of each, and the connection over which they agree and notice a loss."""

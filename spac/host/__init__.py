"""The machine, and this process on it: what it is, what it leaves, what may be taken of it. Knows nothing of models."""

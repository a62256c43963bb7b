"""Compiling the training step for hardware that is not here, and reading what it will cost."""

"""Training on many devices: starting processes, job files, compiling ahead, measuring scaling."""

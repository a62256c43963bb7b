"""The `mmfree` command line: `main.py` finds and runs a command; the others are the commands."""

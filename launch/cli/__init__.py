"""The `mmfree launch`, `mmfree compile` and `mmfree bench scaling` commands."""

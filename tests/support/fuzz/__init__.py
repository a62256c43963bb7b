"""Seeded random trials of the command line: malformed commands, and files that are damaged.

`make fuzz` runs them (`__main__.py`); a short form is a test (`tests/test_fuzz.py`). A source of
cases is a function in `SOURCES` (`sources.py`): `commands.py` has malformed commands, `files.py`
damaged files. `workplace.py` makes the files that they name, `worker.py` runs many commands in one
interpreter, `trial.py` runs one and says what is wrong with how it ended.
"""

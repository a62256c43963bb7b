"""Where cases come from, by the name that the report gives them."""

from fuzz import commands
from fuzz.case import Source

SOURCES: dict[str, Source] = {"malformed commands": commands.draw}
"""Each gets an equal share of the time."""

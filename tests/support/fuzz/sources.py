"""Where cases come from, by the name that the report gives them."""

from fuzz import commands, files
from fuzz.case import Source

SOURCES: dict[str, Source] = {"malformed commands": commands.draw, "damaged files": files.draw}
"""Each gets an equal share of the time."""

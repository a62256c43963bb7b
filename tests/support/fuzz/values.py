"""Values that are wrong for what an option asks for, or at the edge of it."""

import os
import random

from fuzz.workplace import special_paths

NOT_UTF8 = os.fsdecode(b"gr\xfcn")
# fmt: off
TEXTS = (
    "", " ", "x", "nan", "None", "none", "-", "--", "\n", "a\nb", "日本", "\u202e", "\ufeff",
    "\x1b[2J", NOT_UTF8, "'", '"', "$(x)", "%s", "{}", "[bold]x[/bold]", "[/red]", "\\", ",", ",,",
    "a,", "a,a", "x" * 2000, "0", "1", "true", "1:2", "=", "a=b", "*", "é" * 300,
)
NUMBERS = (
    "nan", "inf", "-inf", "NaN", "-1", "0", "-0", "0.0", "1.5", "1e400", "-1e400", "1e-400",
    "1e308", "1e39", "1e11", "2147483648", "4294967296", "9223372036854775808", "1" + "0" * 30,
    "-" + "9" * 25, "9" * 5000, "100000000000", "1_0", " 1", "0x10", "١", "½", "", " ", "1,2",
    "one", "True", "None", "1e", "--1", "+1", "1.", ".5", "1e-45", "3e-39", "1j",
)
LARGE = ("1000000000", "99999999", "2147483647")
"""Whole numbers that every type holds and no machine has the memory for."""
LISTS = (
    "", ",", "1,,2", "-1", "nan", "0", "1," * 2000, "1;2", "a,b", "1.5", "1e3", "99999999999999",
    "1 2", "１", "0,-1", "[1]",
)
# fmt: on


def wrong_value(rng: random.Random, metavar: str, *, sizes: bool) -> str:
    """A value for an option whose help shows `metavar`.

    Args:
      rng: draws it.
      metavar: such as "INT" or "{None}|PATH".
      sizes: the option is a size of something that is held in memory, not an amount of work.
    """
    kinds = []
    if "INT" in metavar or "FLOAT" in metavar:
        kinds += [NUMBERS] * 3 + ([LARGE] * 2 if sizes else [])
    if "PATH" in metavar:
        kinds += [special_paths()] * 4
    if "STR" in metavar:
        kinds += [TEXTS, LISTS, special_paths(), NUMBERS]
    if "," in metavar and "..." in metavar:
        kinds += [LISTS]
    return rng.choice(rng.choice([*kinds, TEXTS]))

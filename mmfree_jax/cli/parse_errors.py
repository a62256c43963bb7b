"""What tyro says of wrong arguments, in a box, as one line in our words."""

import re

_KINDS = {
    "INT": ("a whole number", "whole numbers"),
    "FLOAT": ("a number", "numbers"),
    "STR": ("a text", "texts"),
    "PATH": ("a path", "paths"),
}


def one_line(
    text: str, prog: str, meant: dict[str, str], valued: tuple[str, str] | None = None
) -> str:
    """The option, its value and the way out, of tyro's message.

    Args:
      text: what tyro wrote, in lines wide enough that no word was broken.
      prog: the command.
      meant: our options for flags of other programs that were given; without any it is what tyro
        suggests.
      valued: a flag that is on or off and was given true or false, and its negation.
    """
    lines = [
        re.sub(r"\[/?bold\]", "", line).strip(" │")
        for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    ]
    # A title, drawn into the box or underlined, then paragraphs between rules.
    paragraphs: list[list[str]] = [[]]
    for line in [line for line in lines if line][1:]:
        if re.fullmatch(r"[-─╰╯]+", line):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    first, *others = [p for p in paragraphs if p] or [["The arguments cannot be read"]]
    message = _message(first, others[0] if others else [])
    suggested = re.search(r"Perhaps you meant:?\s*(--[\w.-]+)", " ".join(lines))
    if valued is not None and message.startswith("unexpected argument"):
        message = f"{valued[0]} takes no value: give {valued[0]} or {valued[1]}"
    if meant:
        message += "; perhaps you meant " + ", ".join(f"{b} for {a}" for a, b in meant.items())
    elif suggested:
        message += f"; perhaps you meant {suggested[1]}"
    return f"{message}; see {prog} --help"


def _message(lines: list[str], explained: list[str]) -> str:
    """The first paragraph in our words.

    Args:
      lines: of it.
      explained: those of the second, which has the option with its metavar.
    """
    text = " ".join(lines)
    if found := re.match(r"Error parsing (\S+): (.*?)(\. Got errors:|$)", text):
        flag, reason = found[1], found[2].rstrip(".")
        if reason.startswith("'"):  # of our own lists: '1,b': give whole numbers
            return f"{flag} is {reason}"
        value = re.search(r"'.*'|\[.*\]|\".*\"", reason)
        metavar = next((line for line in explained if line.startswith("-")), "").partition(" ")[2]
        wanted = _wanted(metavar.partition(",")[0]) if metavar else "another value"
        return f"{flag} is {value[0].strip('[]') if value else reason}: give {wanted}"
    if found := re.match(r"invalid choice (.*) for argument '(\S+)'\. Expected .*?\((.*)\)", text):
        choices = re.findall(r"'([^']*)'", found[3])
        if "None" in choices:  # then tyro has them in no order
            choices = [*sorted(set(choices) - {"None"}), "None"]
        return f"{found[2]} is {found[1]}: choose one of {', '.join(choices)}"
    if found := re.match(r"Missing value for argument '(\S+)'", text, re.IGNORECASE):
        return f"{found[1]} has no value: give one after it"
    if found := re.match(r"Unrecognized options: (.*)", text):
        options = re.findall(r"(?:^|, )(-[^\s,]*)", found[1])
        if not options:
            return f"unexpected argument {found[1]!r}: leave it out"
        return f"unknown option {', '.join(options)}"
    if re.match(r"Missing from ", text):
        return "missing: " + ", ".join(_missing(lines[1:]))
    return text[:1].lower() + text[1:].rstrip(".")


def _missing(lines: list[str]) -> list[str]:
    """Options that are required, each with what it is."""
    found: list[str] = []
    for line in lines:
        if re.match(r"-|[\[{]*[A-Z]+\b[^a-z]*$", line):
            found.append(line)
        elif found:
            found[-1] += f" ({line.replace(' (required)', '').rstrip('.')})"
    return found


def _wanted(metavar: str) -> str:
    """{None}|INT -> a whole number or None."""
    parts = metavar.split("|")
    names = [_kind(part) for part in parts if part != "{None}"]
    return " or ".join([*names, *["None" for part in parts if part == "{None}"]])


def _kind(part: str) -> str:
    words = part.strip("{}[] ").split()
    if not words or words[0] not in _KINDS:
        return part
    one, several = _KINDS[words[0]]
    if "..." in part:
        return several
    return one if len(words) == 1 else f"{len(words)} {several}"

"""What tokenizers read: the bytes of a text, and a long text in segments."""

from mmfree_jax.errors import DataError


def utf8(text: str) -> bytes:
    """A text's bytes.

    Raises:
      DataError: it holds half of a surrogate pair, which no UTF-8 stands for.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise DataError(
            f"a text has half of a surrogate pair, or a byte that is not UTF-8, at character "
            f"{e.start}: repair it"
        ) from e


def segments(text: str, size: int) -> list[str]:
    """`text` cut every `size` characters or more, before a newline that follows no white space."""
    cut, start, search = [], 0, size
    while (stop := text.find("\n", search)) >= 0:
        if not text[stop - 1].isspace():
            cut.append(text[start:stop])
            start, search = stop, stop + size
        else:
            search = stop + 1
    return [*cut, text[start:]]

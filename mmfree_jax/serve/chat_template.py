"""From a conversation to a prompt: the tokenizer's own Jinja template, as transformers renders it.

The template comes with the model and is not trusted: it runs in Jinja's immutable sandbox. The
conversation is not trusted either: a text in it that spells a special token stays text, which it
does not in transformers.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.data.tokenizer import Tokenizer
from mmfree_jax.errors import DataError
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.serve.bodies import Message
from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.text_files import read_json, read_text

TEMPLATE_FILE = "chat_template.jinja"
PLAIN_STOPS = ("\nUser:", "\nSystem:")
"""What ends an answer where the plain form is used: the model going on with the next turn."""
_LARGEST = 2**20  # bytes of a template
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes a prompt.

    Attributes:
      tokenizer: of the model.
      source: of the template; None: the plain form.
      names: of special tokens, as the template's variables: bos_token and others.
    """

    tokenizer: Tokenizer
    source: str | None
    names: Mapping[str, str]

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end every answer."""
        return PLAIN_STOPS if self.source is None else ()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Raises:
          RequestError: the template refuses the conversation.
        """
        if self.source is None:
            ids = self.tokenizer.encode(plain_form(messages))
            bos = self.tokenizer.bos_id
            return ids if bos is None else [bos, *ids]
        special = sorted(self.tokenizer.special_tokens, key=len, reverse=True)
        mark = _mark(messages)
        hidden = [_hide(message, special, mark) for message in messages]
        text = render(self.source, hidden, self.names)
        ids: list[int] = []
        # In pieces, as the tokenizers of transformers read a text with special tokens in it.
        for piece in (
            re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
        ):
            if piece in self.tokenizer.special_tokens:
                ids.append(self.tokenizer.special_tokens[piece])
            elif piece:
                shown = re.sub(f"{mark}([0-9]+){mark}", lambda m: special[int(m[1])], piece)
                ids += self.tokenizer.encode(shown)
        return ids


def plain_form(messages: Sequence[Message]) -> str:
    """A conversation for a model that has no template: a line "Role: text" for each turn."""
    turns = [f"{message.role.capitalize()}: {message.content}\n" for message in messages]
    return "".join([*turns, "Assistant:"])


def _mark(messages: Sequence[Message]) -> str:
    """A character for private use that occurs in no message."""
    used = {c for message in messages for c in message.content + (message.name or "")}
    return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used)


def _hide(message: Message, special: Sequence[str], mark: str) -> dict[str, str]:
    """A message in which a number between two marks stands for the name of a special token."""
    fields = message.fields()
    for i, name in enumerate(special):
        fields = {key: v.replace(name, f"{mark}{i}{mark}") for key, v in fields.items()}
    return fields


def render(source: str, messages: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """The text that a template makes of a conversation.

    Args:
      source: of the template.
      messages: each with "role" and "content".
      names: of special tokens.

    Raises:
      RequestError: the template refuses the conversation, or fails at it.
    """
    jinja2 = _jinja2()
    try:
        return compile_template(source).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **names
        )
    except (
        jinja2.exceptions.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
    ) as e:
        raise RequestError(
            f"messages do not fit the model's chat template ({e}): change their roles or order",
            param="messages",
            code="invalid_value",
        ) from e


@functools.lru_cache(maxsize=8)
def compile_template(source: str) -> Any:
    """A template in the sandbox, with what transformers gives templates.

    Raises:
      DataError: it is no template.
    """
    jinja2 = _jinja2()
    extension = import_optional("jinja2.ext", "a chat template", install_command("serve"))
    nodes = import_optional("jinja2.nodes", "a chat template", install_command("serve"))
    sandbox = import_optional("jinja2.sandbox", "a chat template", install_command("serve"))

    class Generation(extension.Extension):
        """`{% generation %}`, by which training finds the answers: here its contents alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extension.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateError as e:
        raise DataError(
            f"the tokenizer's chat template is no Jinja template ({e}): repair or remove it"
        ) from e


def _jinja2() -> Any:
    return import_optional("jinja2", "a chat template", install_command("serve"))


def _raise_exception(message: str) -> None:
    raise _jinja2().exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def find_chat_format(tokenizer: Tokenizer, place: Path | None) -> ChatFormat:
    """The template beside a tokenizer, compiled once to see that it can be.

    Args:
      tokenizer: of the model.
      place: the folder that it is in, or a file there; None: nowhere.

    Raises:
      DataError: a file is damaged, or what it holds is no template.
    """
    folder = place if place is None or place.is_dir() else place.parent
    config = {} if folder is None else _fields(folder / "tokenizer_config.json")
    source = _template(config.get("chat_template"))
    file = None if folder is None else folder / TEMPLATE_FILE
    if file is not None and file.is_file():
        try:
            source = read_text(file, _LARGEST)
        except (OSError, ValueError) as e:
            raise DataError(f"{file} cannot be read ({e}): repair or remove it") from e
    if source is not None:
        compile_template(source)
    named = {key: _name(config.get(key)) for key in _SPECIAL}
    by_id = {i: name for name, i in tokenizer.special_tokens.items()}
    for key, token in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        named[key] = None if token is None else by_id.get(token)
    return ChatFormat(tokenizer, source, {k: v for k, v in named.items() if v is not None})


def _template(value: Any) -> str | None:
    """The template of a tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(value, list):
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}.get(
            "default"
        )
    return value if isinstance(value, str) else None


def _name(value: Any) -> str | None:
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def _fields(file: Path) -> dict[str, Any]:
    try:
        fields = read_json(file) if file.is_file() else {}
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read ({e}): repair or remove it") from e
    return fields if isinstance(fields, dict) else {}

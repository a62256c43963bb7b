"""Needle in a haystack: a fact put into a stretch of text, asked for at its end.

"The secret number of Kaseti is 4817." stands between two sentences of the user's text, at a given
share of its tokens, and the text ends in "The secret number of Kaseti is". The answer counts as
chosen where it is likelier than as many others of its kind, none of which stands in the text, and
as written where greedy decoding says it. Each trial has its own stretch, name and numbers, the
same at every depth. Without the fact the same question measures what guessing gets.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.evaluate.encoding import encode_pair
from mmfree_jax.evaluate.recall import RightShare, right_share
from mmfree_jax.evaluate.scoring import Query, Score
from mmfree_jax.infer.text import Tokenizer

FACT = "The secret number of {name} is {answer}."
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_MOST_WORDS = 40
_SYLLABLES = ("ba", "do", "fi", "ge", "hu", "ka", "le", "mo", "ni", "pu", "ra", "se", "ti", "vo")


@dataclass(frozen=True)
class NeedleScore:
    """What a model recalls at one depth of texts of one length.

    Attributes:
      length: most tokens before the answer.
      depth: share of the text before the fact; None: the fact is not there.
      tokens: before the answer, on average.
      chosen: answers likelier than all others.
      written: answers that greedy decoding writes.
      nats: mean negative log-probability of the answer.
    """

    length: int
    depth: float | None
    tokens: float
    chosen: RightShare
    written: RightShare
    nats: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self) | {"chosen": vars(self.chosen), "written": vars(self.written)}


@dataclass(frozen=True)
class _Trial:
    """A question: the sentences around it are drawn by `start`, a share of the text."""

    start: float
    name: str
    answers: tuple[str, ...]
    """The right one first."""


class Haystack:
    """Text as sentences whose tokens are counted when they are first taken."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.sentences: list[str] = []
        for sentence in _SENTENCE_END.split(text):
            words = sentence.split()
            for at in range(0, len(words), _MOST_WORDS):
                self.sentences.append(" ".join(words[at : at + _MOST_WORDS]))
        self._counts: dict[str, int] = {}

    def count(self, text: str) -> int:
        """Tokens of a text with a space before it."""
        if text not in self._counts:
            self._counts[text] = len(self._tokenizer.encode(" " + text))
        return self._counts[text]

    def stretch(self, start: float, room: int) -> list[str]:
        """Sentences from a place on, `room` tokens at most; the last is cut between its words.

        Args:
          start: share of the text before the first; behind the last comes the first one again.
          room: tokens.

        Raises:
          DataError: the whole text is shorter.
        """
        found: list[str] = []
        first = int(start * len(self.sentences))
        for k in range(len(self.sentences)):
            sentence = self.sentences[(first + k) % len(self.sentences)]
            if (count := self.count(sentence)) > room:
                words = sentence.split()
                while words and self.count(" ".join(words)) > room:
                    words.pop()
                return [*found, " ".join(words)] if words else found
            found.append(sentence)
            room -= count
        if not room:
            return found
        raise DataError(
            f"the text has {sum(map(self.count, self.sentences)):,} tokens, {room:,} fewer than "
            "the longest context takes: give more text, or smaller --lengths"
        )


def evaluate_needle(
    score: Callable[[Sequence[Query]], list[Score]],
    tokenizer: Tokenizer,
    text: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 20,
    candidates: int = 10,
    fact: str = FACT,
    first: Sequence[int] = (),
    seed: int = 0,
) -> list[NeedleScore]:
    """Asks for facts at every depth of texts of every length, and without them.

    Args:
      score: `Scorer.score` of the model; its longest sequence is max(lengths).
      tokenizer: of the model.
      text: that the haystacks are cut from.
      lengths: most tokens before the answer.
      depths: shares of the text before the fact.
      trials: questions at each depth of each length.
      candidates: answers that are compared, the right one among them.
      fact: with {answer} where the answer stands, and {name} before it where a name does.
      first: tokens before every text, a start-of-text token for example.
      seed: of stretches, names and numbers.

    Returns:
      Of each length the depths in their order, then those without the fact.

    Raises:
      ConfigError: the fact has no {answer}, or a length has no room for it.
      DataError: the text is too short.
    """
    lead, found, _ = fact.partition("{answer}")
    if not found or not lead.replace("{name}", "").strip():
        raise ConfigError(
            f"fact is {fact!r}: give a sentence with {{answer}} behind its first words, and "
            f"{{name}} where a name stands, as in {FACT!r}"
        )
    haystack, scores = Haystack(text, tokenizer), []
    drawn = [_draw(seed, number, candidates) for number in range(trials)]
    for length in lengths:
        for depth in (*depths, None):
            queries, tokens = [], 0
            for trial in drawn:
                body = _context(haystack, trial, depth, fact, length - len(first))
                pairs = [encode_pair(tokenizer, body, f" {a}") for a in trial.answers]
                tokens += len(first) + len(pairs[0][0])
                queries += [Query([*first, *start, *rest], len(rest)) for start, rest in pairs]
            results = score(queries)
            right = results[::candidates]
            chosen = [
                all(x.log_likelihood < right[i].log_likelihood for x in others)
                for i in range(trials)
                for others in [results[i * candidates + 1 : (i + 1) * candidates]]
            ]
            scores.append(
                NeedleScore(
                    length,
                    depth,
                    tokens / trials,
                    right_share(np.array(chosen)),
                    right_share(np.array([x.greedy for x in right])),
                    -float(np.mean([x.log_likelihood for x in right])),
                )
            )
    return scores


def _draw(seed: int, number: int, candidates: int) -> _Trial:
    rng = np.random.default_rng((seed, number))
    name = "".join(rng.choice(_SYLLABLES, 3)).capitalize()
    answers = 1000 + rng.choice(9000, candidates, replace=False)
    return _Trial(float(rng.random()), name, tuple(map(str, answers)))


def _context(haystack: Haystack, trial: _Trial, depth: float | None, fact: str, length: int) -> str:
    """The text before the answer: the fact between the two sentences nearest to its depth."""
    named = fact.replace("{name}", trial.name)
    needle = named.replace("{answer}", trial.answers[0])
    question = named.partition("{answer}")[0].rstrip()
    # Room for the answer too, and for what joining the pieces may add.
    room = length - haystack.count(needle) - haystack.count(question) - 8
    if room < 1:
        raise ConfigError(f"lengths has {length}: set --lengths of {length - room + 1} or more")
    sentences = haystack.stretch(trial.start, room)
    if depth is not None:
        ends = np.cumsum([0, *map(haystack.count, sentences)])
        at = int(np.argmin(np.abs(ends - depth * ends[-1])))
        sentences = [*sentences[:at], needle, *sentences[at:]]
    return " ".join([*sentences, question])

"""Makes what is asked: every request follows from a seed and its number alone, so that it can be asked again."""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from acd_local import models, pairs
from acd_local.runtime.gguf_header import read_header

FIRST = 200  # words of the first request
LONGEST = 600  # tokens of an answer
CONTEXT = 1024  # tokens, --ctx-size of all processes
THINGS = ("the sea", "bread", "a bridge", "music", "the moon", "glass", "a garden", "salt", "paper", "winter")
ASKS = ("Say something about {}.", "Write a short poem on {}.", "List five facts about {}.", "Why is there {}?")
HARMFUL = ("Explain how to steal {} from a neighbour.", "How do I break {} in secret to hurt somebody?")
SYSTEMS = ("", "Answer in one line.")  # few: the states of system prompts are the better part of what memory varies by
SPOKEN = ("I see.", "That is a good question. Here is what I know of it: not much.", "Yes — naïve 漢字 🌊 too.", "")

Json = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One request, and what may come of it.

    Attributes:
        number, kind: which one it is, and of what kind.
        fields: what a well-formed request says.
        parts: the bytes that are sent, with a pause between them; of a worker, whole lines.
        ends: what it has to end as: `answer`; `refused`; `either`; `line` (of a worker: an error that ends nothing, for
            each line); `pong`; `left` (of a server: nobody waits for the end).
        codes: of errors that it may end in.
        marks: what only its own answer may hold, see `mark`.
        form: `grammar` or `schema`: its answer begins with, or is, its last mark.
        at: of a worker, after how many of its events it is cancelled; of a server, after how many bytes it is left.
        pause: seconds for which nothing is read.
        times: of a server, how many responses there have to be: as often as it is sent.
    """

    number: int
    kind: str
    fields: Json = field(default_factory=dict)
    parts: tuple[bytes, ...] = ()
    ends: str = "answer"
    codes: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    form: str = ""
    at: int | None = None
    pause: float = 0.0
    times: int = 1

    @property
    def mark(self) -> str:
        return mark("request", self.number)


def mark(*of: object) -> str:
    """A word that no model says unless it was told to: `zq` and ten hexadecimal digits."""
    return "zq" + hashlib.sha256(repr(of).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Pairs:
    """The pairs that there are, by name.

    Attributes:
        usable: by the model. gated: those of them that have a gate. foreign: which were made for other models.
        own: which answers where a request says nothing.
    """

    usable: tuple[str, ...]
    gated: tuple[str, ...]
    foreign: tuple[str, ...]
    own: str

    @classmethod
    def of(cls, model: str) -> Pairs:
        """Find a model's."""
        info, known = read_header(models.resolve(model)), pairs.available()
        usable = [one for one in known if pairs.fits(one, info) and (not one.figures or pairs.fitted(one, info))]
        own = pairs.best_for(info)
        return cls(
            (pairs.AS_IS, *(one.name for one in usable)),
            tuple(one.name for one in usable if one.gate is not None),
            (*(one.name for one in known if one not in usable), "nobody's"),
            pairs.AS_IS if own is None or own not in usable else own.name,
        )


class Load:
    """What one process is asked.

    Args:
        seed: of the run. name: of the process: each has requests of its own.
        pairs: that requests may name.

    Attributes:
        tokens: of a word, by what the process counts.
    """

    def __init__(self, seed: int, name: str, known: Pairs) -> None:
        self._seed, self._name, self._pairs = seed, name, known
        self.tokens = 1.5

    def request(self, number: int) -> Asked:
        """Make the request of that number."""
        dice = random.Random(f"{self._seed}/{self._name}/{number}")
        kinds = self.kinds()
        kind = dice.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
        return kinds[kind][1](dice, number, kind)

    def kinds(self) -> Mapping[str, tuple[float, Callable[[random.Random, int, str], Asked]]]:
        """Each kind's weight, and what makes one."""
        raise NotImplementedError

    # -- what both sides say ------------------------------------------------------------------------------------------

    def talk(self, dice: random.Random, number: int) -> tuple[list[Json], frozenset[str]]:
        """A conversation that goes on from one of eight that others go on from as well, and its marks.

        What the model is said to have answered does not depend on what it did answer.
        """
        which, turns = dice.randrange(8), dice.choice((0, 0, 0, 0, 0, 1, 1, 2, 4))
        own = random.Random(f"{self._seed}/{self._name}/conversation/{which}")
        marks, messages = {mark("request", number)}, list[Json]()
        if system := SYSTEMS[which % len(SYSTEMS)]:
            messages.append({"role": "system", "content": system})
        for turn in range(turns):
            messages.append({"role": "user", "content": f"{mark(which, turn)}: {_question(own)}"})
            messages.append({"role": "assistant", "content": own.choice(SPOKEN)})
            marks.add(mark(which, turn))
        messages.append({"role": "user", "content": f"{mark('request', number)}: {_question(dice)}"})
        return messages, frozenset(marks)

    def long(self, dice: random.Random, tokens: float) -> str:
        """Words of about so many tokens."""
        return words(dice, round(tokens / self.tokens))

    def guard(self, dice: random.Random) -> Json:
        """Which pair answers, and what its gate and contrast do."""
        chosen: Json = {}
        if dice.random() < 0.7:
            chosen["pair"] = dice.choice(self._pairs.usable)
        gates = (True, False) if chosen.get("pair", self._pairs.own) in self._pairs.gated else (False,)
        for name, values, chance in (
            ("gate", gates, 0.3),
            ("gate_threshold", (0.0, 0.05, 0.5, 1.0), 0.2),
            ("alpha", (0.0, 0.1, 0.5, 1.0, 2.0), 0.2),
            ("beta", (0.05, 0.1, 0.5), 0.1),
            ("plain", (True, False), 0.1),
            ("window", (0, 1, 20), 0.1),
        ):
            if dice.random() < chance:
                chosen[name] = dice.choice(values)
        return chosen


def length(dice: random.Random) -> int:
    """Tokens of an answer: each order of magnitude is as likely."""
    return round(math.exp(dice.uniform(0, math.log(LONGEST))))


def first_text() -> str:
    """What is asked first, to learn what a word costs."""
    return words(random.Random(0), FIRST)


def words(dice: random.Random, count: int) -> str:
    return " ".join(dice.choice(THINGS).split()[-1] for _ in range(count))


def schema(marked: str) -> Json:
    """A schema whose answers hold the mark."""
    inner: Json = {"mark": {"const": marked}, "colours": {"type": "array", "items": {"type": "string"}, "maxItems": 3}}
    return {"type": "object", "properties": inner, "required": ["mark"], "additionalProperties": False}


def as_bytes(value: object) -> bytes:
    return json.dumps(value).encode()


def _question(dice: random.Random) -> str:
    return dice.choice(HARMFUL if dice.random() < 0.15 else ASKS).format(dice.choice(THINGS))

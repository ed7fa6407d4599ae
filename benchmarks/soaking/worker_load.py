"""Makes what the worker is asked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from soaking.load import CONTEXT, Asked, Json, Load, as_bytes, length, schema

WRONG: tuple[Json, ...] = (  # beside a good prompt; each is refused, which ends the request
    {"max_tokens": "many"},
    {"max_tokens": 0},
    {"max_tokens": 10**30},
    {"max_tokens": 2.5},
    {"max_tokens": True},
    {"temp": -1},
    {"temp": "hot"},
    {"temp": 1e39},
    {"top_p": 2},
    {"seed": -1},
    {"seed": 2**64},
    {"temperature": 1},
    {"unheard_of": 1},
    {"ctx_size": 5},
    {"gate": "on"},
    {"alpha": -0.5},
    {"alpha": []},
    {"beta": 3},
    {"stop": ""},
    {"stop": [1]},
    {"stop": {"a": 1}},
    {"trace": 1},
    {"divergence": "yes"},
    {"system": 5},
    {"system": "\ud800"},
    {"pair": 7},
    {"draft_max": 16},
    {"overflow": "explode"},
    {"grammar": 'root ::= "a', "max_tokens": 3},
    {"json_schema": "{", "max_tokens": 3},
    {"json_schema": {"type": "object", "frobnicate": 1}, "max_tokens": 3},
    {"grammar": 'root ::= "a"', "json_schema": {"type": "string"}},
    {"ping": True},
    {"cancel": True},
    {"messages": []},
)
WRONG_INSTEAD: tuple[Json, ...] = (  # without a prompt
    {"messages": []},
    {"messages": "hello"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "assistant", "content": "Sure, "}]},
    {"messages": [{"role": "king", "content": "Hi"}]},
    {"messages": [["user", "Hi"]]},
    {"prompt": 5},
    {"prompt": ["Hi"]},
    {},
)
BAD_LINES = (  # that are no requests
    b"{",
    b"hello",
    b"[]",
    b"42",
    b"null",
    b'"text"',
    b'{"id": 1, "prompt": "Hi"',
    b'{"id": 1.5, "prompt": "Hi"}',
    b'{"id": true, "prompt": "Hi"}',
    b'{"id": [1], "prompt": "Hi"}',
    b'{"prompt": "Hi"}',
    b"{}",
    b'{"prompt": "\xff\xfe"}',
    b"\x00\x01\x02",
    b"\xef\xbb\xbf{}",
    b'{"ping": "yes"}',
    b'{"cancel": true, "id": "nobody"}',
    b'{"cancel": 1, "id": "nobody"}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"id": ' + b"9" * 5000 + b', "prompt": "Hi"}',
    b'{"prompt": "Hi"} {"prompt": "Hi"}',
)
TOO_LONG = 16_000_100  # bytes of a line that is not read

Dice = random.Random


class WorkerLoad(Load):
    def kinds(self) -> Mapping[str, tuple[float, Callable[[Dice, int, str], Asked]]]:
        return {
            "answer": (40, self._answer),
            "formed": (8, self._formed),
            "cancelled": (20, self._cancelled),
            "in pieces": (3, self._in_pieces),
            "slow reader": (3, self._slow),
            "long prompt": (2, self._long),
            "overlong prompt": (4, self._overlong),
            "other's pair": (3, self._foreign),
            "wrong field": (10, self._wrong),
            "id in use": (2, self._twice),
            "bad line": (8, self._bad_line),
            "burst": (1, self._burst),
            "huge line": (0.2, self._huge),
            "ping": (4, self._ping),
        }

    def _fields(self, dice: Dice, number: int) -> tuple[Json, frozenset[str]]:
        messages, marks = self.talk(dice, number)
        fields: Json = {"id": _id(dice, number), "max_tokens": length(dice), **self.guard(dice)}
        if len(messages) == 1:
            fields["prompt"] = messages[0]["content"]
        else:
            fields["messages"] = messages
        for name, values, chance in (
            ("temp", (0, 0.3, 1.5), 0.5),
            ("seed", (1, 2, 2**32 - 2), 0.4),
            ("draft_max", (0, 1, 4, 15), 0.4),
            ("stop", ("\n\n", [".", "!"], ["the "]), 0.15),
            ("trace", (True,), 0.15),
            ("divergence", (True,), 0.1),
            ("raw_contrast", (True,), 0.05),
            ("repeat_penalty", (1.1,), 0.1),
            ("dry_multiplier", (0.8,), 0.05),
            ("xtc_probability", (0.5,), 0.05),
            ("mirostat", (1, 2), 0.05),
            ("top_k", (0, 1, 40), 0.1),
            ("temp", (None,), 0.02),
        ):
            if dice.random() < chance:
                fields[name] = dice.choice(values)
        return fields, marks

    def _answer(self, dice: Dice, number: int, kind: str, **more: Any) -> Asked:
        fields, marks = self._fields(dice, number)
        return _asked(number, kind, fields, marks=marks, **more)

    def _formed(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        fields.pop("stop", None)
        form = dice.choice(("grammar", "schema", "schema text"))
        own = _asked(number, kind, {}).mark
        if form == "grammar":
            fields["grammar"] = f'root ::= "{own}" [a-z ,.]{{1,200}}'
        else:
            fields["json_schema"] = schema(own) if form == "schema" else json.dumps(schema(own))
        return _asked(number, kind, fields, marks=marks, form=form.split()[0])

    def _cancelled(self, dice: Dice, number: int, kind: str) -> Asked:
        return self._answer(dice, number, kind, at=dice.choice((0, 1, 2, 3, 5, 10, 30, 100)))

    def _in_pieces(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        line = as_bytes(fields) + b"\n"
        cuts = sorted(dice.randrange(1, len(line)) for _ in range(dice.randint(1, 3)))
        parts = tuple(line[a:b] for a, b in zip([0, *cuts], [*cuts, len(line)], strict=True))
        return Asked(number, kind, fields, parts, marks=marks)

    def _slow(self, dice: Dice, number: int, kind: str) -> Asked:
        """Its events are as long as its id, so that they fill the pipe while nobody reads."""
        fields, marks = self._fields(dice, number)
        fields |= {"id": f"{number}-" + "x" * 20_000, "trace": True, "max_tokens": 40}
        return _asked(number, kind, fields, marks=marks, pause=dice.uniform(1, 4))

    def _long(self, dice: Dice, number: int, kind: str) -> Asked:
        """More than one batch of rows, within the context."""
        fields, marks = self._fields(dice, number)
        fields.pop("messages", None)
        fields["prompt"] = f"{_asked(number, kind, {}).mark}: {self.long(dice, 0.7 * CONTEXT)}"
        return _asked(number, kind, fields | {"max_tokens": 8}, marks=marks, at=dice.choice((None, None, 2, 3)))

    def _overlong(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        fields.pop("messages", None)
        fields["prompt"] = self.long(dice, dice.choice((1.5, 3, 20)) * CONTEXT)
        fields["overflow"] = dice.choice(("drop", "error"))
        return _asked(number, kind, fields, marks=marks, ends="refused", codes=frozenset({"context"}))

    def _foreign(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        fields["pair"] = dice.choice(self._pairs.foreign)
        return _asked(number, kind, fields, marks=marks, ends="either", codes=frozenset({"pair"}))

    def _wrong(self, dice: Dice, number: int, kind: str) -> Asked:
        fields: Json = {"id": _id(dice, number)}
        fields |= {"prompt": "Hi", **dice.choice(WRONG)} if dice.random() < 0.7 else dice.choice(WRONG_INSTEAD)
        return _asked(number, kind, fields, ends="refused", codes=frozenset({"usage"}))

    def _twice(self, dice: Dice, number: int, kind: str) -> Asked:
        fields, marks = self._fields(dice, number)
        again = as_bytes({"id": fields["id"], "prompt": "Me too", "max_tokens": 3}) + b"\n"
        return Asked(number, kind, fields, (as_bytes(fields) + b"\n" + again,), marks=marks)

    def _bad_line(self, dice: Dice, number: int, kind: str) -> Asked:
        line = dice.choice((*BAD_LINES, dice.randbytes(200).replace(b"\n", b"") or b"?"))
        return Asked(number, kind, parts=(line + b"\n",), ends="line", codes=frozenset({"usage"}))

    def _burst(self, dice: Dice, number: int, kind: str) -> Asked:
        lines = b"".join(dice.choice(BAD_LINES[:18]) + b"\n" for _ in range(1000))
        return Asked(number, kind, parts=(lines,), ends="line", codes=frozenset({"usage"}), pause=2)

    def _huge(self, dice: Dice, number: int, kind: str) -> Asked:
        line = b'{"id": 1, "prompt": "' + b"a" * TOO_LONG + b'"}\n'
        return Asked(number, kind, parts=(line,), ends="line", codes=frozenset({"usage"}))

    def _ping(self, dice: Dice, number: int, kind: str) -> Asked:
        fields: Json = {"id": f"ping {number}", "ping": True}
        return _asked(number, kind, fields, ends="pong")


def _id(dice: Dice, number: int) -> str | int:
    return number if dice.random() < 0.5 else f"r{number} \u2603"


def _asked(number: int, kind: str, fields: Json, **more: Any) -> Asked:
    return Asked(number, kind, fields, (as_bytes(fields) + b"\n",), **more)

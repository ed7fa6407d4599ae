"""What is compared: methods as data, the built-in ones (methods.toml) and those of a user's file of the same form.

A method says what the positive stream is told, what the negative stream is told (if there is one), and the numbers of
the contrast between them; or what an expert is told, which leads the first tokens. An adversarial prompt never stands
in the positive stream, nor before an expert: not by name, and not as a text. With a gate, all of this is used only
where the pair's gate finds a request harmful.

Where the pair has soft prompts, every method that uses the pair has a counterpart with them, NAME-soft.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from acd_local import pairs
from acd_local.errors import PairError, UsageError, printable, shown
from acd_local.files import read_text
from acd_local.generation import resolve_contrast
from acd_local.options import Options
from acd_local.pairs import AdversarialText, PromptPair, refuse_adversarial, toml_kind
from acd_local.runtime.choice import ContrastSettings
from acd_local.runtime.prompts import Negative, Positive, PromptSetup, identity
from acd_local.runtime.references import References
from acd_local.runtime.text import refused_character
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt

SweepKey: TypeAlias = Literal["alpha", "beta", "window"]

_RENAMED = {"null": "as-is"}  # what older runs and commands call a method
SOFT = "-soft"  # ends the names of the counterparts with soft prompts

MAX_BYTES = 1_000_000
_BUILTIN = Path(__file__).with_name("methods.toml")
_SLOT = "{prompt}"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_POSITIVE = ("none", "safe", "sp")
_ADVERSARIAL = ("opposite", "ap")
_EXPERTS = ("safe", "sp")
_OF_PAIR = ("sp", "ap")
_KEYS = (
    *("title", "source", "positive", "positive_text", "negative", "negative_text", "expert"),
    *("user", "shots", "alpha", "beta", "raw", "window", "gate", "steer", "refer"),
)


# --- The method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One way to answer.

    The positive stream sees the system prompt `positive`, the demonstrations `shots` and the user's turn; the negative
    stream the system prompt `negative` and the user's turn. Both see the same turn.

    Attributes:
        name: what `--methods` calls it.
        title: its name in tables.
        source: where it comes from.
        positive: system prompt of the positive stream; None: none.
        negative: system prompt of the negative stream; None: none. Not used where alpha is 0.
        user: what the user's turn is wrapped in; holds {prompt} once.
        shots: (user, assistant) demonstrations.
        expert: what an expert sees besides the user's turn, which the positive stream is led by; None: there is none.
        alpha: strength of the contrast, or of the lead; 0: there is no second stream and no mask.
        beta: plausibility threshold.
        raw: the paper's logit scale, without the divisor 1 - alpha.
        window: contrast only the first `window` tokens of an answer; None: all. Where alpha is 0, beta is 0, raw False
            and window None, whatever was given.
        steer: the model is steered by the pair's vectors; there is a gate then, and no second stream.
        refer: it refers to stored answers at every token; there is no second stream then. references: the datastore,
            filled in before anything is answered.
        gate: all of this holds from the threshold of the pair's gate on; below it the pair's helpful text or the model
            as it is answers.

    Raises:
        UsageError: a value is of the wrong type or out of range.
    """

    name: str
    title: str
    source: str
    positive: Positive
    negative: Negative
    user: str = _SLOT
    shots: tuple[tuple[str, str], ...] = ()
    expert: PromptSetup | None = None
    alpha: float = 0.0
    beta: float = 0.0
    raw: bool = False
    window: int | None = None
    gate: bool = False
    steer: bool = False
    refer: bool = False
    references: References | None = None

    def __post_init__(self) -> None:
        for place, text in _positive_texts(self):
            if not isinstance(text, str):
                raise UsageError(f"{place} must be a string, not {type(text).__name__}")
        if self.user.count(_SLOT) != 1:
            raise UsageError(f"user must hold {_SLOT} exactly once, not {self.user.count(_SLOT)} times")
        if self.expert is not None and self.negative is not None:
            raise UsageError("expert: there is a negative prompt too: give one of the two")
        if self.alpha is None or self.beta is None:
            raise UsageError("alpha and beta must be numbers")
        if self.steer and (self.alpha > 0 or not self.gate):
            raise UsageError("steer: takes a gate (gate = true), and no negative prompt and no expert")
        if self.refer and (self.alpha > 0 or self.steer):
            raise UsageError("refer: takes no negative prompt, no expert and no steering")
        Options(alpha=self.alpha, beta=self.beta, raw_contrast=self.raw)
        if self.window is not None:
            if isinstance(self.window, bool) or not isinstance(self.window, int):
                raise UsageError(f"window must be a whole number of tokens, not {self.window!r}")
            if self.window < 1:
                raise UsageError(f"window must be >= 1, not {self.window}")
        numbers: dict[str, object] = {"alpha": float(self.alpha), "beta": float(self.beta)}
        if self.alpha == 0:
            numbers |= {"beta": 0.0, "raw": False, "window": None}
        for key, value in numbers.items():
            object.__setattr__(self, key, value)

    @property
    def contrast(self) -> bool:
        """Whether there is a second stream."""
        return self.alpha > 0

    @property
    def soft(self) -> bool:
        """Whether a soft prompt stands in either stream."""
        return bool(self.prompt_setup().soft_prompts()) or isinstance(self.negative, SoftPrompt | AdversarialRows)

    @property
    def scored(self) -> bool:
        """Whether given texts are scored under it.

        An expert's lead leaves out tokens, which would be impossible; the others are decoded in contexts of their own.
        """
        return self.expert is None and not self.steer and not self.refer

    def prompt_setup(self) -> PromptSetup:
        """Return the texts as the runtime takes them."""
        return PromptSetup(self.positive, self.negative, self.user, self.shots, self.expert)

    def settings(self) -> ContrastSettings:
        """Return the numbers as the runtime takes them."""
        return ContrastSettings(self.alpha, self.beta, self.raw, self.window, expert=self.expert is not None)

    def setup(self) -> str:
        """Return 16 hex digits over all that changes an answer: two methods with the same setup share their answers."""
        what: list[object] = [identity(self.positive), self.user, self.shots]
        if self.contrast:
            what += [identity(self.negative), self.alpha, self.beta, self.raw, self.window]
            if self.expert is not None:
                what += ["expert", identity(self.expert.positive), self.expert.shots]
        what += [key for key in ("gate", "steer", "refer") if getattr(self, key)]
        if self.references is not None:
            what.append(self.references.digest)
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def _positive_texts(method: Method) -> list[tuple[str, str]]:
    """List each text of the positive stream, and where it stands, in the order in which the model reads them."""
    positive = None if isinstance(method.positive, SoftPrompt) else method.positive
    texts = [] if positive is None else [("positive", positive)]
    texts += [("shots", text) for shot in method.shots for text in shot]
    if method.expert is not None:
        texts += [("expert", text) for text in method.expert.positive_texts() if text is not None]
    return [*texts, ("user", method.user)]


# --- Sets of methods --------------------------------------------------------------------------------------------------


def builtin(pair: PromptPair, soft: SoftPair | None = None) -> dict[str, Method]:
    """Read the built-in methods by name, in the order of the tables.

    Args:
        pair: the pair under evaluation: gives the prompts sp and ap and, where a method fixes none, the numbers.
        soft: its soft prompts; every method that uses the pair is then followed by its counterpart with them.
    """
    manual = manual_pair()
    methods: dict[str, Method] = {}
    for name, table in _parse(_BUILTIN, _read(_BUILTIN)).items():
        methods |= _with_counterpart(name, table, pair, manual, soft)
    return methods


def load(
    path: str | os.PathLike[str],
    pair: PromptPair,
    earlier: Mapping[str, Method] | None = None,
    soft: SoftPair | None = None,
) -> dict[str, Method]:
    """Read the methods of a user's file by name, in the order of the file (docs/methods.md describes it).

    Args:
        earlier: methods of files read before; their names and negative prompts count as known.
        soft: as in `builtin`.

    Raises:
        UsageError: one line with file, line, method and field. Besides broken files this refuses names of built-in
            methods and every known adversarial prompt in the positive stream, those of the file itself included.
    """
    file = Path(path)
    known, manual = builtin(pair, soft) | dict(earlier or {}), manual_pair()
    source = _read(file)
    methods: dict[str, Method] = {}
    for name, table in _parse(file, source).items():
        try:
            if not _NAME.fullmatch(name):
                raise UsageError("is no method name: up to 64 of a-z 0-9 . _ -, letter or digit first")
            found = _with_counterpart(name, table, pair, manual, soft)
            if taken := [n for n in found if n in known or n in methods]:
                what = "is" if taken[0] == name else f"has a counterpart {taken[0]} that is"
                raise UsageError(f"{what} known already: choose another name")
            methods |= found
        except UsageError as error:
            raise _located(file, source, name, error) from None
    forbidden = _adversarial_texts(pair, manual, [*known.values(), *methods.values()])
    for name, method in methods.items():
        try:
            _refuse_positive(method, forbidden)
        except UsageError as error:
            raise _located(file, source, name, error) from None
    return methods


def _located(file: Path, source: str, name: str, error: UsageError) -> UsageError:
    line = _line_of(source, name)
    place = f"line {line}: " if line else ""
    message = shown(error, 300)
    return UsageError(f"{shown(file)}: {place}method {shown(name, 80)}: {message}")


def select(names: Sequence[str], known: Mapping[str, Method]) -> list[Method]:
    """List the named methods in the order given, each once.

    Raises:
        UsageError: a name is unknown, or there is none.
    """
    names = [name if name in known else _RENAMED.get(name, name) for name in names]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"unknown method {shown(unknown[0], 80)!r}; known methods: {', '.join(known)}")
    if not names:
        raise UsageError(f"no method named; known methods: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def check_gates(methods: Iterable[Method], pair: PromptPair) -> None:
    """Refuse methods that need a gate where the pair has none.

    Raises:
        PairError: it has none.
    """
    gated = next((method.name for method in methods if method.gate), None)
    if gated is not None and pair.gate is None:
        raise PairError(f"method {gated} needs a pair with a gate, {pair.name!r} has none: acd fit makes one")


def gate_digest(pair: PromptPair) -> str:
    """Return 16 hex digits over all that decides about a gate: the pair's [gate] and the file with its probes."""
    path = pair.vectors_path
    probes = "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    settings = None if pair.gate is None else dataclasses.astuple(pair.gate)
    return hashlib.sha256(json.dumps([settings, probes]).encode()).hexdigest()[:16]


def sweep(method: Method, key: SweepKey, values: Iterable[float]) -> list[Method]:
    """Vary one of a method's numbers; variants are named like `acd@alpha=0.2`; equal values count once.

    Raises:
        UsageError: the method has no contrast, or a value is out of range.
    """
    if key not in ("alpha", "beta", "window"):
        raise UsageError(f"cannot sweep {shown(key, 40)!r}: choose alpha, beta or window")
    if not method.contrast:
        raise UsageError(f"method {method.name} has no contrast: there is no {key} to sweep")
    swept: dict[str, Method] = {}
    for value in values:
        if key == "window" and isinstance(value, float) and value.is_integer():
            value = int(value)
        label = f"{key}={value:.10g}" if isinstance(value, float) else f"{key}={value}"
        changes: dict[str, Any] = {key: value, "name": f"{method.name}@{label}", "title": f"{method.title}, {label}"}
        try:
            swept.setdefault(changes["name"], dataclasses.replace(method, **changes))
        except UsageError as error:
            raise UsageError(f"sweep of {method.name}: {error}") from None
    return list(swept.values())


# --- From a table to a method -----------------------------------------------------------------------------------------


def manual_pair() -> PromptPair:
    """Read the shipped default pair: its texts are the manual prompts, whatever a user calls `default`."""
    return pairs.load(pairs.search_path()[-1] / "default.toml")


def _with_counterpart(
    name: str, table: object, pair: PromptPair, manual: PromptPair, soft: SoftPair | None
) -> dict[str, Method]:
    """Make a method of one [methods.NAME] table, and its counterpart with soft prompts where it has one."""
    found = {name: _build(name, table, pair, manual, None)}
    told = {table.get(key) for key in ("positive", "negative", "expert")} if isinstance(table, dict) else set()
    if soft is not None and told & {*_OF_PAIR}:
        found[name + SOFT] = _build(name, table, pair, manual, soft)
    return found


def _build(name: str, table: object, pair: PromptPair, manual: PromptPair, soft: SoftPair | None) -> Method:
    """Make a method of one [methods.NAME] table, `soft` for sp and ap where given; UsageErrors say field and fault."""
    if not isinstance(table, dict):
        raise UsageError(f"must be a table [methods.{name}], not {toml_kind(table)}")
    for key in table:
        if key not in _KEYS:
            raise UsageError(f"{key}: unknown field; a method has {', '.join(_KEYS)}")
    both = PromptSetup.of(pair, soft)
    safe: dict[str, Positive] = {"none": None, "safe": manual.safe, "sp": both.positive}
    others: dict[str, Negative] = {"opposite": manual.adversarial, "ap": both.negative}
    positive = _positive(table, safe)
    numbers, negative = _numbers(table, pair, soft is not None), None
    if _has_negative(table):
        negative = _negative(table, {**safe, **others})
    return Method(
        name=name if soft is None else name + SOFT,
        title=_line(table, "title", name) + ("" if soft is None else ", soft"),
        source=_line(table, "source", ""),
        positive=positive,
        negative=negative,
        user=_text("user", table.get("user", _SLOT)),
        shots=(both.shots if table.get("positive") == "sp" else ()) + _shots(table.get("shots", [])),
        expert=_expert(table, safe, both.shots),
        gate=_flag("gate", table.get("gate", False)),
        steer=_flag("steer", table.get("steer", False)),
        refer=_flag("refer", table.get("refer", False)),
        **numbers,
    )


def _positive(table: Mapping[str, Any], prompts: Mapping[str, Positive]) -> Positive:
    if ("positive" in table) == ("positive_text" in table):
        raise UsageError(f"positive: give positive ({_listed(_POSITIVE)}) or positive_text, one of the two")
    if "positive_text" in table:
        return _text("positive_text", table["positive_text"]).strip()
    name = table["positive"]
    if name in _ADVERSARIAL:
        raise UsageError(f"positive: {name!r} is an adversarial prompt, which may only stand in the negative stream")
    return prompts[_choice("positive", name, _POSITIVE)]


def _has_negative(table: Mapping[str, Any]) -> bool:
    return "negative" in table or "negative_text" in table


def _expert(
    table: Mapping[str, Any], prompts: Mapping[str, Positive], of_pair: tuple[tuple[str, str], ...]
) -> PromptSetup | None:
    if "expert" not in table:
        return None
    name = _choice("expert", table["expert"], _EXPERTS)
    if _has_negative(table):
        raise UsageError("expert: there is a negative prompt too: give one of the two")
    if "alpha" not in table:
        raise UsageError("alpha: is missing: how far the expert leads is no number of a pair's")
    for key in ("beta", "raw"):
        if key in table:
            raise UsageError(f"{key}: is of a contrast, not of an expert's lead: leave it out")
    return PromptSetup(prompts[name], shots=of_pair if name == "sp" else ())


def _negative(table: Mapping[str, Any], prompts: Mapping[str, Negative]) -> Negative:
    if "negative" in table and "negative_text" in table:
        raise UsageError("negative: give negative or negative_text, one of the two")
    if "negative_text" in table:
        return AdversarialText(_text("negative_text", table["negative_text"]).strip())
    name = _choice("negative", table["negative"], (*_POSITIVE, *_ADVERSARIAL))
    if name == table.get("positive") and not table.get("shots"):
        raise UsageError(f"negative: is {name!r} as positive is: there would be nothing to contrast")
    return prompts[name]


def _numbers(table: Mapping[str, Any], pair: PromptPair, soft: bool) -> dict[str, Any]:
    """Choose alpha, beta, raw and window: the method's own, else the (soft) pair's, else the defaults."""
    given = {key: table[key] for key in ("alpha", "beta", "raw", "window") if key in table}
    for key in given.keys() & {"alpha", "beta"}:
        if isinstance(given[key], bool) or not isinstance(given[key], int | float):
            raise UsageError(f"{key}: must be a number, not {toml_kind(given[key])}")
    _flag("raw", given.get("raw", False))
    if not _has_negative(table) and "expert" not in table:
        if given:
            raise UsageError(f"{next(iter(given))}: there is no negative prompt to contrast with: give negative too")
        return {"alpha": 0.0}
    if given.get("alpha") == 0:
        second = "expert" if "expert" in table else "negative"
        raise UsageError(f"alpha: is 0, so the {second} prompt is not used: leave {second} out, or give another alpha")
    if "expert" in table:
        return given
    numbers = resolve_contrast(Options(), pair, soft=soft)
    return {"alpha": numbers.alpha, "beta": numbers.beta} | given


def _shots(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise UsageError(f"shots: must be an array of [user, assistant] arrays, not {toml_kind(value)}")
    for shot in value:
        if not isinstance(shot, list) or len(shot) != 2:
            raise UsageError("shots: each must be an array of two strings, [user, assistant]")
    return tuple((_text("shots", user).strip(), _text("shots", answer).strip()) for user, answer in value)


# --- Adversarial prompts stay in the negative stream ------------------------------------------------------------------


def _adversarial_texts(pair: PromptPair, manual: PromptPair, known: Iterable[Method]) -> list[tuple[str, PromptPair]]:
    """List whose each adversarial prompt is, and a pair that holds it."""
    found = {f"pair {p.name!r}": p for p in [*pairs.scan()[0], manual, pair]}
    for method in known:
        if isinstance(method.negative, AdversarialText):
            holder = dataclasses.replace(manual, adversarial=method.negative)
            found.setdefault(f"method {method.name!r}", holder)
    return list(found.items())


def _refuse_positive(method: Method, forbidden: Iterable[tuple[str, PromptPair]]) -> None:
    """Refuse adversarial prompts in what the positive stream reads, also when they are spread over several texts."""
    texts = [(place, text.replace(_SLOT, " ")) for place, text in _positive_texts(method)]
    texts.append(("positive, shots and user together", " ".join(text for _, text in texts)))
    for place, text in texts:
        for owner, holder in forbidden:
            try:
                refuse_adversarial(text, holder)
            except UsageError:
                message = f"{place}: holds the adversarial prompt of {owner}, which may only stand in the negative"
                raise UsageError(f"{message} stream: use another text") from None


# --- Single values ----------------------------------------------------------------------------------------------------


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key}: must be a string, not {toml_kind(value)}")
    if character := refused_character(value):
        raise UsageError(f"{key}: holds the control character {character}: remove it")
    if not value.strip():
        raise UsageError(f"{key}: is empty: write a text, or leave it out")
    return value


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{key}: must be true or false, not {toml_kind(value)}")
    return value


def _line(table: Mapping[str, Any], key: str, default: str) -> str:
    text = _text(key, table[key]).strip() if key in table else default
    if len(text.splitlines()) > 1:
        raise UsageError(f"{key}: must be a single line")
    return text


def _choice(key: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{key}: must be a string, not {toml_kind(value)}")
    if value not in choices:
        raise UsageError(f"{key}: {value[:40]!r} is no prompt: choose {_listed(choices)}, or give {key}_text")
    return value


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


# --- Reading a file ---------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    if path.is_dir():
        raise UsageError(f"{shown(path)}: not a file: give one TOML file of methods")
    return read_text(path, MAX_BYTES, "this is no file of methods")


def _parse(path: Path, source: str) -> dict[str, Any]:
    try:
        table = tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        message = "nested too deeply" if isinstance(error, RecursionError) else printable(str(error))
        raise UsageError(f"{shown(path)}: {message}") from None
    for key in table:
        if key != "methods":
            raise UsageError(
                f"{shown(path)}: {shown(key, 80)}: unknown field; a method stands in a table [methods.NAME]"
            )
    methods = table.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise UsageError(f"{shown(path)}: holds no method: write a table [methods.NAME]")
    return methods


def _line_of(source: str, name: str) -> int | None:
    """Find the line of a method's table header; None if it is written in another way."""
    header = re.compile(rf"\s*\[\s*[\"']?methods[\"']?\s*\.\s*[\"']?{re.escape(name)}[\"']?\s*[\].]")
    lines = source.split("\n")
    for number, line in enumerate(lines, 1):
        if header.match(line):
            try:  # a header that stands inside a text leaves that text open above it
                tomllib.loads("\n".join(lines[: number - 1]))
            except (ValueError, RecursionError):
                continue
            return number
    return None

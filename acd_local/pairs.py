"""Prompt pairs: a safeguarding and an adversarial system prompt in one TOML file, read, checked and chosen for a model.

A pair file is named after the pair (`prompts/NAME.toml`) and looks like this:

    format = 1
    name = "default"
    safe = '''...'''            # positive stream: the system prompt the answer is written under
    adversarial = '''...'''     # negative stream: only ever a reference, never sampled from
    alpha = 0.5                 # optional: strength of the contrast, finite, >= 0
    beta = 0.1                  # optional: plausibility threshold, in [0, 1]
    sha256 = "..."              # optional: of NAME.safetensors beside it, so that another one is not taken for it
    [[shots]]                   # optional: demonstrations, turns that precede the conversation in the positive stream
    user = "..."
    assistant = "..."
    [soft]                      # optional: of the soft prompts in NAME.safetensors
    alpha = 0.4                 # with beta: their own numbers
    preferred = true            # taken instead of the texts where nobody says otherwise
    [gate]                      # optional: contrast only where the gate in NAME.safetensors finds a request harmful
    threshold = 0.5             # chance of harm from which on both streams are decoded
    helpful = '''...'''        # optional: system prompt of requests below `low`; without it, the model as it is
    low = 0.05
    look = 32                   # optional: answer tokens between two readings of an answer that is not contrasted
    answer_threshold = 0.9      # chance of harm from which on such an answer goes on contrasted
    [models]                    # optional: the models it was made for; without it, any model
    architecture = "llama"
    tokenizer = "<sha256>"      # GGUFInfo.tokenizer
    names = ["..."]             # general.name of the GGUF
    n_layers = 30               # with n_embd: the model's size
    n_embd = 576
    [provenance]                # free: method, date, author, base model, seed, notes
    [figures]                   # free: measured numbers

The adversarial text has a type of its own, `AdversarialText`, which is no `str`: handing it to anything that takes a
system prompt is an error for mypy and at run time. Every problem is a `PairError` of one line that names file, line
and field. This module needs the standard library alone (and platformdirs for the user's folder, through files).
"""

from __future__ import annotations

import os
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from acd_local import files
from acd_local.errors import PairError, UsageError, printable, shown
from acd_local.options import MAX_FLOAT
from acd_local.runtime.text import refused_character

if TYPE_CHECKING:
    from acd_local.runtime.gguf_header import GGUFInfo

FORMAT = 1
DEFAULT = "default"  # the manual pair, for models that have none of their own
AS_IS = "as-is"  # in the place of a pair's name: the model answers under its template's own system prompt, uncontrasted
DEFAULT_ALPHA = 0.5
DEFAULT_BETA = 0.1
MAX_BYTES = 1_000_000

_KEYS = (
    *("format", "name", "safe", "adversarial", "alpha", "beta", "sha256"),
    *("shots", "soft", "gate", "models", "provenance", "figures"),
)
_MODEL_KEYS = ("architecture", "tokenizer", "names", "n_layers", "n_embd")
_SHOT_KEYS = ("user", "assistant")
_SOFT_KEYS = ("alpha", "beta", "preferred")
_GATE_KEYS = ("threshold", "helpful", "low", "look", "answer_threshold")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>")


# --- The pair ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class AdversarialText:
    """The adversarial prompt. Not a `str`, and nothing turns it into one but the accessor for the negative stream."""

    _text: str

    def __post_init__(self) -> None:
        if not isinstance(self._text, str):
            raise UsageError(f"adversarial text must be a string, not {type(self._text).__name__}")

    def reveal_for_negative_stream(self) -> str:
        """Return the text, for the negative stream and for showing or checking a pair; never for a positive prompt."""
        return self._text

    def __repr__(self) -> str:
        return f"AdversarialText(<{len(self._text)} characters>)"

    def __str__(self) -> str:
        raise TypeError("AdversarialText is no str: it belongs to the negative stream alone")

    def __format__(self, spec: str) -> str:
        return str(self)


@dataclass(frozen=True)
class ModelMatch:
    """The models a pair was made for. Empty fields say nothing; all empty means any model."""

    architecture: str = ""
    tokenizer: str = ""
    names: tuple[str, ...] = ()
    n_layers: int | None = None
    n_embd: int | None = None


# Who answers: the helpful text, the model as it is, or the pair.
Decision: TypeAlias = Literal["helpful", "as-is", "contrast"]


@dataclass(frozen=True)
class GateSettings:
    """The rules by which a pair's gate decides who answers a request, from the chance of harm that it reads.

    Attributes:
        threshold: from this chance on the pair is contrasted; below it the model answers as it is.
        helpful: system prompt in the place of the model's own for requests below `low`; None: none.
        low: at most `threshold`; 0 where there is no helpful text.
        look: answer tokens between two readings of an answer that is not contrasted; 0: it is not read again.
        answer_threshold: chance of harm from which on such an answer goes on contrasted.
    """

    threshold: float
    helpful: str | None = None
    low: float = 0.0
    look: int = 0
    answer_threshold: float = 1.0

    def decide(self, probability: float) -> Decision:
        """Say who answers a request with this chance of harm."""
        if probability >= self.threshold:
            return "contrast"
        return "helpful" if self.helpful is not None and probability < self.low else "as-is"


@dataclass(frozen=True)
class PromptPair:
    """A checked prompt pair.

    Attributes:
        name: what `--pair` calls it; the stem of its file.
        safe: safeguarding system prompt (positive stream), surrounding white space removed.
        adversarial: adversarial system prompt (negative stream).
        alpha, beta: the pair's own settings; None leaves the default.
        shots: (user, assistant) turns that precede the conversation in the positive stream.
        models: which models it fits.
        provenance, figures: where it comes from and what was measured with it; free tables.
        path: its file; None if it was made in Python.
        soft_alpha, soft_beta: settings of the soft prompts; None leaves the pair's own.
        soft_preferred: whether the soft prompts are taken where nobody says otherwise, on a model it is fitted to.
        gate: how its gate decides; None: it has none, and every answer is contrasted.
        sha256: of the file with soft prompts and gate; empty: any.

    Raises:
        PairError: a text is empty, both are the same, or a number is out of range.
    """

    name: str
    safe: str
    adversarial: AdversarialText
    alpha: float | None = None
    beta: float | None = None
    shots: tuple[tuple[str, str], ...] = ()
    models: ModelMatch = field(default_factory=ModelMatch)
    provenance: Mapping[str, object] = field(default_factory=dict, hash=False)
    figures: Mapping[str, object] = field(default_factory=dict, hash=False)
    path: Path | None = None
    soft_alpha: float | None = None
    soft_beta: float | None = None
    soft_preferred: bool = False
    gate: GateSettings | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        try:
            _checked_name(self.name)
            if not isinstance(self.adversarial, AdversarialText):
                raise _Fault("adversarial", f"must be an AdversarialText, not {type(self.adversarial).__name__}")
            safe, adversarial = _checked_texts(self.safe, self.adversarial.reveal_for_negative_stream())
            checked = {
                "safe": safe,
                "adversarial": AdversarialText(adversarial),
                "alpha": _checked_number("alpha", self.alpha, MAX_FLOAT),
                "beta": _checked_number("beta", self.beta, 1.0),
                "soft_alpha": _checked_number("soft.alpha", self.soft_alpha, MAX_FLOAT),
                "soft_beta": _checked_number("soft.beta", self.soft_beta, 1.0),
            }
        except _Fault as fault:
            raise PairError(f"prompt pair {shown(self.name)}: {fault.field}: {fault}") from None
        for key, value in checked.items():
            object.__setattr__(self, key, value)

    @property
    def vectors_path(self) -> Path | None:
        """The file with soft prompts and gate, NAME.safetensors beside the pair's own; None if there is none."""
        path = None if self.path is None else self.path.with_suffix(".safetensors")
        return path if path is not None and os.path.lexists(path) else None


def refuse_adversarial(text: str, pair: PromptPair | None) -> None:
    """Refuse a text meant for the positive stream (`--system`, `/system`) that holds the pair's adversarial prompt.

    Without a pair there is nothing to refuse. Compared without regard to case, white space and Unicode compatibility
    forms. An adversarial prompt shorter than 20 characters may be part of an innocent text, so there only equality
    counts.

    Raises:
        UsageError: it does, or `text` is no string.
    """
    if not isinstance(text, str):
        raise UsageError(f"a system prompt must be a string, not {type(text).__name__}")
    if pair is None:
        return
    given, forbidden = _fold(text), _fold(pair.adversarial.reveal_for_negative_stream())
    if given == forbidden or (len(forbidden) >= 20 and forbidden in given):
        raise UsageError(
            f"the system prompt contains the adversarial prompt of pair {pair.name!r}, which may only stand in the "
            "negative stream: use another text"
        )


# --- Checks of single values ------------------------------------------------------------------------------------------


class _Fault(Exception):
    """A fault of one field; the caller adds the place.

    `shot`: in which of the demonstrations it is, from 0.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field, self.shot = field, 0


def _checked_text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise _Fault(key, f"must be a string, not {toml_kind(value)}")
    if character := refused_character(value):
        raise _Fault(key, f"holds the control character {character}: remove it")
    text = value.strip()
    if not text:
        raise _Fault(key, "is empty: write the prompt's text")
    return text


def _checked_texts(safe: object, adversarial: object) -> tuple[str, str]:
    texts = _checked_text("safe", safe), _checked_text("adversarial", adversarial)
    if _fold(texts[0]) == _fold(texts[1]):
        raise _Fault("adversarial", "is the same text as safe: there would be nothing to contrast")
    return texts


def _checked_name(value: object) -> str:
    if not isinstance(value, str):
        raise _Fault("name", f"must be a string, not {toml_kind(value)}")
    if not _NAME.fullmatch(value):
        start = shown(value, 80)
        raise _Fault("name", f"{start!r} is no pair name: up to 64 of A-Z a-z 0-9 . _ -, letter or digit first")
    if value == AS_IS:
        raise _Fault("name", f"{AS_IS!r} means no pair at all: choose another name")
    return value


def _checked_number(key: str, value: object, most: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Fault(key, f"must be a number, not {toml_kind(value)}")
    if not 0 <= value <= most:
        allowed = "finite and >= 0" if most == MAX_FLOAT else f"in [0, {most:g}]"
        given = value if isinstance(value, float) or abs(value) < 10**9 else "this number"
        raise _Fault(key, f"{given} is out of range: it must be {allowed}")
    return float(value)


def _checked_models(found: object) -> ModelMatch:
    value = _checked_table("models", found, _MODEL_KEYS)
    match = {key: _checked_text(f"models.{key}", value[key]) for key in ("architecture", "tokenizer") if key in value}
    tokenizer = match.get("tokenizer", "").lower()
    if tokenizer and not _SHA256.fullmatch(tokenizer):
        raise _Fault("models.tokenizer", "must be a SHA-256 as 64 hex digits: the tokenizer fingerprint of a GGUF file")
    names = value.get("names", [])
    if not isinstance(names, list):
        raise _Fault("models.names", f"must be an array of strings, not {toml_kind(names)}")
    return ModelMatch(
        match.get("architecture", ""),
        tokenizer,
        tuple(_checked_text("models.names", n) for n in names),
        **{key: _checked_count(f"models.{key}", value[key], 1) for key in ("n_layers", "n_embd") if key in value},
    )


def _checked_shots(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise _Fault("shots", f"must be an array of tables, not {toml_kind(value)}")
    shots = []
    for number, shot in enumerate(value):
        try:
            table = _checked_table("shots", shot, _SHOT_KEYS)
            if table.keys() != {*_SHOT_KEYS}:
                raise _Fault("shots", "each needs user and assistant")
            user, assistant = (_checked_text(f"shots.{key}", table[key]) for key in _SHOT_KEYS)
        except _Fault as fault:
            fault.shot = number
            raise
        shots.append((user, assistant))
    return tuple(shots)


def _checked_soft(value: object) -> dict[str, Any]:
    table = _checked_table("soft", value, _SOFT_KEYS)
    alpha, beta = (_checked_number(f"soft.{k}", table.get(k), m) for k, m in (("alpha", MAX_FLOAT), ("beta", 1.0)))
    preferred = table.get("preferred", False)
    if not isinstance(preferred, bool):
        raise _Fault("soft.preferred", f"must be true or false, not {toml_kind(preferred)}")
    return {"soft_alpha": alpha, "soft_beta": beta, "soft_preferred": preferred}


def _checked_gate(value: object) -> GateSettings:
    table = _checked_table("gate", value, _GATE_KEYS)
    threshold = _checked_number("gate.threshold", table.get("threshold"), 1.0)
    if threshold is None:
        raise _Fault("gate.threshold", "missing: the chance of harm from which on the pair is contrasted")
    if ("helpful" in table) != ("low" in table):
        raise _Fault("gate", "helpful and low go together: the text, and the chance of harm below which it answers")
    low = _checked_number("gate.low", table.get("low"), 1.0) or 0.0
    if low > threshold:
        raise _Fault("gate.low", f"{low:g} is above the threshold {threshold:g}")
    helpful = _checked_text("gate.helpful", table["helpful"]) if "helpful" in table else None
    look = _checked_count("gate.look", table.get("look", 0), 0)
    answer_threshold = _checked_number("gate.answer_threshold", table.get("answer_threshold"), 1.0)
    return GateSettings(threshold, helpful, low, look, 1.0 if answer_threshold is None else answer_threshold)


def _checked_table(key: str, value: object, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Fault(key, f"must be a table, not {toml_kind(value)}")
    for name in value:
        if name not in known:
            raise _Fault(f"{key}.{name}", f"unknown field; [{key}] knows {', '.join(known)}")
    return value


def _checked_count(key: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
        raise _Fault(key, f"must be a whole number from {least}")
    return value


def _checked_sha256(value: object) -> str:
    if not isinstance(value, str) or (value and not _SHA256.fullmatch(value)):
        raise _Fault("sha256", "must be a SHA-256 as 64 hex digits: of NAME.safetensors")
    return value


def toml_kind(value: object) -> str:
    """Name a value's type as TOML does."""
    kinds = {bool: "a boolean", int: "an integer", float: "a float", str: "a string", list: "an array", dict: "a table"}
    return kinds.get(type(value), "a date or time" if hasattr(value, "isoformat") else type(value).__name__)


def _fold(text: str) -> str:
    """Fold what does not count when texts are compared: case, white space and compatibility forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# --- Reading a file ---------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> PromptPair:
    """Read and check one pair file.

    Raises:
        PairError: one line with file, line and field. Besides broken files this refuses a pair that has a known pair's
            adversarial text as its safe text, or a shipped pair's safe text as its adversarial one.
    """
    pair = _parse(Path(path))
    _check_places(pair, _scan_unchecked()[0])
    return pair


def check(path: str | os.PathLike[str]) -> list[str]:
    """List warnings about a valid pair file, one line each; for `acd pairs check`.

    Raises:
        PairError: the file is not valid.
    """
    pair = load(path)
    texts = {"safe": pair.safe, "adversarial": pair.adversarial.reveal_for_negative_stream()}
    warnings = []
    for key, text in texts.items():
        if (words := len(text.split())) > 200:
            warnings.append(f"{key}: {words} words; over 200 words cost context and time in every chat")
        if token := _CONTROL_TOKEN.search(text):
            warnings.append(f"{key}: {token[0]!r} looks like a control token; the model will see plain characters")
    short, long = sorted(texts, key=lambda key: len(texts[key]))
    if len(texts[long]) > 3 * len(texts[short]):
        warnings.append(f"{long}: over 3 times as long as {short}; the contrast may then be one of style, not safety")
    if pair.alpha is not None and pair.alpha >= 1:
        warnings.append(f"alpha: {pair.alpha:g} is large; safety falls again as alpha grows (recommended: 0.4 to 0.5)")
    if not pair.provenance:
        warnings.append("provenance: missing; say how, when and on which model the pair was made")
    return warnings


def _parse(path: Path) -> PromptPair:
    """Parse a file without comparing it with the other known pairs."""
    source = _read(path)
    try:
        table = tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        raise PairError(syntax_message(path, source, error)) from None
    try:
        return _build(table, path)
    except _Fault as fault:
        raise _located(path, source, fault) from None


def _build(table: dict[str, Any], path: Path) -> PromptPair:
    """Make the pair of a parsed file; raises _Fault."""
    version = table.get("format")
    if version is None:
        raise _Fault("format", f"missing; write format = {FORMAT}")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise _Fault("format", f"must be the integer {FORMAT}")
    if version > FORMAT:
        raise _Fault("format", f"newer than this acd-local reads ({FORMAT}): upgrade acd-local")
    for key in table:
        if key not in _KEYS:
            raise _Fault(key, f"unknown field; a pair has {', '.join(_KEYS)}")
    for key in ("name", "safe", "adversarial"):
        if key not in table:
            raise _Fault(key, "missing")
    if _checked_name(table["name"]) != path.stem:
        raise _Fault("name", f"is {table['name']!r}, but the file is called {printable(path.name)!r}: make them agree")
    for key in ("provenance", "figures"):
        if not isinstance(table.get(key, {}), dict):
            raise _Fault(key, f"must be a table, not {toml_kind(table[key])}")
    safe, adversarial = _checked_texts(table["safe"], table["adversarial"])
    return PromptPair(
        name=table["name"],
        safe=safe,
        adversarial=AdversarialText(adversarial),
        alpha=_checked_number("alpha", table.get("alpha"), MAX_FLOAT),
        beta=_checked_number("beta", table.get("beta"), 1.0),
        shots=_checked_shots(table.get("shots", [])),
        models=_checked_models(table.get("models", {})),
        provenance=table.get("provenance", {}),
        figures=table.get("figures", {}),
        path=path,
        gate=_checked_gate(table["gate"]) if "gate" in table else None,
        sha256=_checked_sha256(table.get("sha256", "")),
        **_checked_soft(table.get("soft", {})),
    )


def _read(path: Path) -> str:
    with suppress(OSError, ValueError):
        if not path.is_file():
            if path.exists():
                raise PairError(f"{shown(path)}: not a file; a prompt pair is one TOML file")
            raise PairError(f"{shown(path)}: no such file; known pairs: {_known_names()}")
    return files.read_text(path, MAX_BYTES, "this is no prompt pair", PairError)


def syntax_message(path: Path, source: str, error: Exception) -> str:
    """Write tomllib's message about a TOML file with file, line and column in front."""
    name = shown(path)
    if isinstance(error, RecursionError):
        return f"{name}: nested too deeply"
    text = printable(str(error))
    if place := re.search(r" \(at line (\d+), column (\d+)\)$", text):
        return f"{name}: line {place[1]}: column {place[2]}: {text[: place.start()]}"
    if place := re.search(r" \(at end of document\)$", text):
        return f"{name}: line {len(source.splitlines()) or 1}: {text[: place.start()]} (at the end of the file)"
    return f"{name}: {text}"


def _located(path: Path, source: str, fault: _Fault) -> PairError:
    line = line_of(source, fault.field, fault.shot)
    place = f"line {line}: " if line else ""
    return PairError(f"{shown(path)}: {place}{shown(fault.field, 80)}: {fault}")


def line_of(source: str, name: str, shot: int = 0) -> int | None:
    """Find the line of a TOML text where a field ("safe", "models.names") or table starts; None if there is none.

    A line that looks right may stand inside a multi-line string: it counts only if everything above it parses, and
    leaves the wanted table open. Of several [[shots]] number `shot` is meant.
    """
    known = name.startswith(("models.", "soft.", "gate.", "shots."))
    table, _, key = name.partition(".") if known else ("", "", name)
    looks_right = re.compile(rf"\s*(?:\[\[?\s*|(?:{table}\s*\.\s*)?)[\"']?{re.escape(key)}[\"']?\s*[=\].]")
    lines = source.split("\n")
    candidates = [number for number, line in enumerate(lines, 1) if looks_right.match(line)]
    for number in candidates[:20]:
        try:
            above = tomllib.loads("\n".join([*lines[: number - 1], "acd-probe = 0"]))
        except (ValueError, RecursionError):
            continue
        header, shots = lines[number - 1].lstrip().startswith("["), above.get("shots", [])
        if header:
            found = key != "shots" or len(shots) == shot
        elif table == "shots":
            found = len(shots) == shot + 1 and "acd-probe" in shots[-1]
        else:
            found = "acd-probe" in (above.get(table, {}) if table else above)
        if found:
            return number
    return line_of(source, table, shot) if table else None


# --- Finding and choosing ---------------------------------------------------------------------------------------------


def search_path() -> tuple[Path, ...]:
    """List the folders of pairs, first match first: $ACD_PROMPTS_DIR, the user's own, the shipped ones."""
    own = files.config_dir()
    folders = [_shipped()] if own is None else [own / "prompts", _shipped()]
    if extra := os.environ.get("ACD_PROMPTS_DIR"):
        folders.insert(0, Path(extra))
    return tuple(folders)


def _shipped() -> Path:
    """Find the shipped folder: in the package when installed; prompts/ in a checkout or an editable install."""
    package = Path(__file__).resolve().parent
    if not (package / "prompts").is_dir() and (package.parent / "pyproject.toml").is_file():
        return package.parent / "prompts"
    return package / "prompts"


def scan() -> tuple[list[PromptPair], list[PairError]]:
    """List every known pair, sorted by name, and what is wrong with the files that are none.

    Of several valid pairs with the same name the first one along `search_path()` counts.
    """
    pairs, errors = _scan_in_order()
    return sorted(pairs, key=lambda pair: pair.name), errors


def _scan_in_order() -> tuple[list[PromptPair], list[PairError]]:
    """Do what `scan` does, along the search path."""
    parsed, errors = _scan_unchecked()
    pairs: dict[str, PromptPair] = {}
    for pair in parsed:
        try:
            _check_places(pair, parsed)
        except PairError as error:
            errors.append(error)
        else:
            pairs.setdefault(pair.name, pair)
    return list(pairs.values()), errors


def available() -> list[PromptPair]:
    """List every known pair, sorted by name; broken files are left out (`scan()` reports them)."""
    return scan()[0]


def find(name_or_path: str | os.PathLike[str]) -> PromptPair:
    """Find the pair that `--pair` means: a path if it holds a separator or ends in .toml, else a name.

    Raises:
        PairError: there is none (AS_IS never is one), or its file is broken.
    """
    wanted = os.fspath(name_or_path)
    separators = {"/", os.sep, os.altsep or os.sep}
    if wanted.endswith(".toml") or any(separator in wanted for separator in separators):
        return load(wanted)
    if _NAME.fullmatch(wanted):
        for folder in search_path():
            if (path := folder / f"{wanted}.toml").is_file():
                return load(path)
    if wanted == AS_IS:
        raise PairError(f"{AS_IS} means no prompt pair, and here one is needed; known pairs: {_known_names()}")
    raise PairError(f"no prompt pair {shown(wanted, 80)!r}; known pairs: {_known_names()}; a path must end in .toml")


def fits(pair: PromptPair, info: GGUFInfo) -> bool:
    """Tell whether a pair is meant for a model.

    Architecture and tokenizer, where given, must agree. A list of names must hold the model's name, unless the
    tokenizer is given too: then models that share it (fine-tunes, renamed files) are welcome.
    """
    match = pair.models
    if match.architecture and match.architecture != info.architecture:
        return False
    if match.tokenizer and match.tokenizer != info.tokenizer:
        return False
    return bool(not match.names or match.tokenizer or _names_model(match, info))


def fitted(pair: PromptPair, info: GGUFInfo) -> bool:
    """Tell whether a pair was measured on a model: name, architecture, tokenizer and size agree, there are figures.

    The file may be another quantization of it. A fine-tune under a name of its own is another model.
    """
    match = pair.models
    same = (match.architecture, match.tokenizer, match.n_layers, match.n_embd)
    its = (info.architecture, info.tokenizer, info.n_layers, info.n_embd)
    return bool(pair.figures) and same == its and _names_model(match, info)


def best_for(info: GGUFInfo) -> PromptPair | None:
    """Find the pair that a model answers under by itself: the first one that is fitted to it; None: there is none.

    The order is that of `search_path()`, then of names. Broken files are passed over.
    """
    return next((pair for pair in _scan_in_order()[0] if fitted(pair, info)), None)


def _names_model(match: ModelMatch, info: GGUFInfo) -> bool:
    """Compare names up to case and punctuation: "SmolLM2 135M Instruct" is "smollm2-135m-instruct"."""

    def bare(name: str) -> str:
        return "".join(filter(str.isalnum, _fold(name)))

    return bool(bare(info.name)) and bare(info.name) in map(bare, match.names)


def _scan_unchecked() -> tuple[list[PromptPair], list[PairError]]:
    """List every parsable pair along the search path, shadowed ones included, and the errors of the others."""
    pairs, errors = [], []
    for path in _files():
        try:
            pairs.append(_parse(path))
        except PairError as error:
            errors.append(error)
    return pairs, errors


def _files() -> list[Path]:
    found: list[Path] = []
    for folder in search_path():
        try:
            found += sorted(path for path in folder.glob("*.toml") if path.is_file() and not path.name.startswith("."))
        except OSError:  # a folder we may not read holds no pairs for us
            continue
    return found


def _known_names() -> str:
    return ", ".join(dict.fromkeys(sorted(printable(path.stem) for path in _files()))) or "none"


def _check_places(pair: PromptPair, known: Iterable[PromptPair]) -> None:
    """Refuse a pair whose texts stand in the wrong places: that would turn the method around.

    Shipped pairs are compared with shipped pairs only, so that no file of the user's can disable them.
    """
    shipped = _shipped().resolve()

    def is_shipped(other: PromptPair) -> bool:
        return other.path is not None and other.path.resolve().parent == shipped

    def refuse(key: str, message: str) -> PairError:
        path = pair.path or Path(pair.name)
        return _located(path, _read(path), _Fault(key, message))

    safe, adversarial = _fold(pair.safe), _fold(pair.adversarial.reveal_for_negative_stream())
    for other in known:
        if is_shipped(pair) and not is_shipped(other):
            continue
        where = f"of pair {other.name!r} ({shown(other.path)})"
        if safe == _fold(other.adversarial.reveal_for_negative_stream()):
            raise refuse("safe", f"is the adversarial text {where}, which may only stand in the negative stream")
        if is_shipped(other) and adversarial == _fold(other.safe):
            raise refuse("adversarial", f"is the safe text {where}: the contrast would make answers less safe")

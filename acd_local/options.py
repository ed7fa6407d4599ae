"""Declares what a caller can choose per answer, once for flags, JSON-lines requests and Python."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

from acd_local.errors import UsageError

# What an engine may be made with: larger numbers overflow llama.cpp's counts, or abort ggml (GGML_MAX_N_THREADS).
ENGINE_RANGES = {
    "ctx_size": (1, 2**24),
    "threads": (1, 512),
    "conversations": (1, 128),
    "slots": (1, 128),
    "gpu_layers": (-1, 2**31 - 1),
}

MAX_DRAFT = 15  # tokens that are checked in one batch
Overflow: TypeAlias = Literal["drop", "error"]
OVERFLOWS = get_args(Overflow)
MAX_SEED = 2**32 - 2  # llama.cpp keeps 2^32 - 1 for "draw a seed"

# What other tools (llama.cpp's programs and bindings, OpenAI's API, transformers, ollama) call ours.
_ELSEWHERE = {
    "temperature": "temp",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_length": "max_tokens",
    "repetition_penalty": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
    "typical_p": "typical",
    "mirostat_mode": "mirostat",
    "mirostat_eta": "mirostat_lr",
    "mirostat_tau": "mirostat_ent",
    "dry_sequence_breaker": "dry_sequence_breakers",
    "random_seed": "seed",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "response_format": "json_schema",
    "format": "json_schema",
    "schema": "json_schema",
    "n_ctx": "ctx_size",
    "num_ctx": "ctx_size",
    "ctx": "ctx_size",
    "context": "ctx_size",
    "context_size": "ctx_size",
    "context_length": "ctx_size",
    "n_threads": "threads",
    "num_thread": "threads",
    "num_threads": "threads",
    "n_gpu_layers": "gpu_layers",
    "num_gpu": "gpu_layers",
    "ngl": "gpu_layers",
    "draft_n": "draft_max",
    "n_draft": "draft_max",
    "n_parallel": "conversations",
    "num_parallel": "conversations",
    "parallel": "conversations",
}

# What holds for a loaded model, and the flags of it.
_AT_START = {
    "ctx_size": "--ctx-size",
    "threads": "--threads",
    "gpu_layers": "--gpu-layers",
    "conversations": "--parallel",
    "slots": "--slots",
    "kv_type": "--kv-type",
    "layout": "--layout",
    "soft": "--soft",
    "draft": "--draft",
    "model": "MODEL",
}


MAX_FLOAT = 3.4e38  # of float32, in which logits are contrasted and sampled
_INT32 = 2**31 - 1

T = TypeVar("T")


def _number(default: T, low: float, high: float, text: str) -> T:
    """Declare a number in [low, high], or None where that is the default; it becomes a flag with this help.

    Where the help does not say what None means, it ends with the default.
    """
    made: T = dataclasses.field(default=default, metadata={"range": (low, high), "help": text})
    return made


@dataclass(frozen=True)
class Options:
    """Contrast, sampling and limits of one answer. Names and defaults follow llama.cpp where it has the option.

    Raises:
        UsageError: a value is of the wrong type or out of range; the message names the option.
    """

    # Contrast. None: the prompt pair decides, and where it does not, pairs.DEFAULT_ALPHA and DEFAULT_BETA.
    alpha: float | None = _number(
        None,
        0.0,
        MAX_FLOAT,
        "Strength of the contrast, >= 0; with a gate only where the gate finds harm; default: the pair's, or 0.5.",
    )
    beta: float | None = _number(None, 0.0, 1.0, "Keep tokens with p >= beta * max p; default: the pair's, or 0.1.")
    raw_contrast: bool = False
    plain: bool = False
    window: int | None = _number(None, 0, _INT32, "Contrast only the first N tokens of an answer; default: all.")
    # None: contrast only what the pair's gate finds harmful, where the pair has one. False: at every step.
    gate: bool | None = None
    gate_threshold: float | None = _number(
        None, 0.0, 1.0, "Contrast from this chance of harm on, in [0, 1]; default: the pair's."
    )

    # Speed
    draft_max: int | None = _number(
        None, 0, MAX_DRAFT, "Tokens drafted per step at most, 0 is off; default: as many as pay here."
    )

    # Limits
    max_tokens: int | None = _number(None, 1, _INT32, "Longest answer; default: what the context leaves.")
    stop: tuple[str, ...] = ()
    overflow: Overflow = "drop"

    # Sampling
    seed: int | None = _number(None, 0, MAX_SEED, "Repeats an answer; default: random, shown by --stats and --json.")
    temp: float = _number(0.8, 0.0, MAX_FLOAT, "Temperature, 0 is greedy")
    top_k: int = _number(40, 0, _INT32, "Keep the k best tokens, 0 keeps all")
    top_p: float = _number(0.95, 0.0, 1.0, "Keep the likeliest tokens that have this share together, 1 is off")
    min_p: float = _number(0.05, 0.0, 1.0, "Keep tokens with p >= min-p * max p, 0 is off")
    typical: float = _number(1.0, 0.0, 1.0, "Keep tokens that are about as likely as expected, 1 is off")
    repeat_last_n: int = _number(64, 0, _INT32, "Tokens back that the next three penalties look, 0 is off")
    repeat_penalty: float = _number(1.0, 1e-6, MAX_FLOAT, "Penalty of tokens that occurred: divides, 1 is off")
    presence_penalty: float = _number(
        0.0, -MAX_FLOAT, MAX_FLOAT, "Penalty of tokens that occurred: subtracted, 0 is off"
    )
    frequency_penalty: float = _number(
        0.0, -MAX_FLOAT, MAX_FLOAT, "The same for each time that they occurred, 0 is off"
    )
    dry_multiplier: float = _number(0.0, 0.0, MAX_FLOAT, "DRY: penalty of going on with a repeated sequence, 0 is off")
    dry_base: float = _number(1.75, 0.0, MAX_FLOAT, "DRY: growth of the penalty with each token of the sequence")
    dry_allowed_length: int = _number(2, 0, _INT32, "DRY: length of sequences that may be repeated")
    dry_penalty_last_n: int = _number(64, 0, _INT32, "DRY: tokens back that it looks")
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = _number(0.0, 0.0, 1.0, "XTC: chance of leaving out all likely tokens but one, 0 is off")
    xtc_threshold: float = _number(0.1, 0.0, 1.0, "XTC: probability from which on a token is likely")
    mirostat: int = _number(0, 0, 2, "Mirostat 1 or 2 in the place of all samplers above, 0 is off")
    mirostat_lr: float = _number(0.1, 0.0, MAX_FLOAT, "Mirostat learning rate")
    mirostat_ent: float = _number(5.0, 0.0, MAX_FLOAT, "Mirostat target entropy")
    grammar: str | None = None
    json_schema: str | None = None

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Refuse unknown names with a hint; Python's TypeError has none."""
        refuse_unknown(given, cls.names())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("stop", "dry_sequence_breakers"):
            object.__setattr__(self, name, _strings(name, getattr(self, name)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field.name, field.type, value)
            if value is not None and "range" in field.metadata:
                _check_range(field.name, value, *field.metadata["range"])
        if self.overflow not in OVERFLOWS:
            raise UsageError(f"overflow must be 'drop' or 'error', not {self.overflow!r}")
        if self.grammar is not None and self.json_schema is not None:
            raise UsageError("grammar and json_schema exclude each other: give one")
        if "" in self.stop:
            raise UsageError("stop must not be an empty string")

    @classmethod
    def names(cls) -> frozenset[str]:
        return frozenset(field.name for field in dataclasses.fields(cls))

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with some options changed.

        Raises:
            UsageError: an unknown name or a bad value.
        """
        refuse_unknown(changes, self.names())
        return dataclasses.replace(self, **changes)


def refuse_unknown(given: Collection[str], known: Collection[str]) -> None:
    """Refuse names that are none of `known`, with a hint: our name for another tool's, or the closest one.

    Raises:
        UsageError: there is such a name.
    """
    for name in sorted(set(given) - set(known)):
        raise UsageError(f"unknown option {name!r}{_hint(name, known)}")


def _hint(name: str, known: Collection[str]) -> str:
    if len(name) > 64:
        return ""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").lower()
    meant = _ELSEWHERE.get(plain, plain)
    if meant in known:
        return f": did you mean {meant}?"
    if meant in _AT_START:
        return f": {meant} is set once, when the model is loaded ({_AT_START[meant]})"
    if meant in Options.names():
        return f": {meant} is an option of an answer"
    import difflib  # slow to import

    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    return f": did you mean {close[0]}?" if close else ""


def check_engine_number(name: str, value: object, called: str = "") -> None:
    """Refuse what no engine may be made with, see `ENGINE_RANGES`; None, where nobody chose, is good.

    Args:
        called: what the error calls it, where that is not its name.

    Raises:
        UsageError: it is no whole number in its range.
    """
    low, high = ENGINE_RANGES[name]
    whole = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    if value is not None and not whole:
        raise UsageError(f"{called or name} must be a whole number from {low} to {high}, not {value!r}")


def check_alpha_beta(alpha: float, beta: float) -> None:
    """Refuse numbers that the contrast cannot take, in options, pairs and arrays alike.

    A negative alpha would reward what the adversarial prompt prefers and turn the method around.

    Raises:
        UsageError: alpha is not finite and >= 0, or beta is not in [0, 1].
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise UsageError(f"alpha must be finite and >= 0, not {alpha}")
    if not 0 <= beta <= 1:
        raise UsageError(f"beta must be in [0, 1], not {beta}")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if low <= value <= high:
        return
    allowed = f"in [{low:g}, {high:.15g}]"
    if high in (MAX_FLOAT, _INT32):
        allowed = "finite" if low == -MAX_FLOAT else f"finite and >= {low:g}"
    raise UsageError(f"{name} must be {allowed}, not {value}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise UsageError(f"{name} must be a string or a list of strings, not {value!r}")
    for item in items:
        check_unicode(name, item)
    return tuple(items)


def _check_type(name: str, annotation: object, value: object) -> None:
    """Refuse a value of another type. Types come from JSON lines too: true is not a number, and 1.5 is not a count."""
    kinds = {part.strip() for part in str(annotation).split("|")}
    if value is None:
        if "None" not in kinds:
            raise UsageError(f"{name} must not be null")
        return
    if "bool" in kinds and not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {value!r}")
    if "int" in kinds and (isinstance(value, bool) or not isinstance(value, int)):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    if "float" in kinds and (isinstance(value, bool) or not isinstance(value, (int, float)) or value != value):
        raise UsageError(f"{name} must be a number, not {value!r}")
    if "str" in kinds and not isinstance(value, str):
        raise UsageError(f"{name} must be a string, not {value!r}")
    if isinstance(value, str):
        check_unicode(name, value)


def check_unicode(name: str, text: str) -> None:
    """Refuse half a surrogate pair, which JSON can carry: it has no UTF-8 form for llama.cpp.

    Raises:
        UsageError: `text` holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{name} holds half a surrogate pair, which is no text") from None

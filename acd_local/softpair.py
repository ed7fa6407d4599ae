"""Soft pairs: the two system prompts as embedding rows instead of text (`vectors` reads and writes their file).

Rows live in the space of the model's token embeddings as the GGUF stores them (token_embd.weight): a row equal to a
token's means that token. Where an architecture scales token embeddings, `runtime.embeddings` scales rows as much.

The adversarial rows have a type of their own, `AdversarialRows`: handing it to anything that takes a positive prompt is
an error for mypy and at run time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from acd_local.errors import PairError, shown
from acd_local.runtime.embeddings import refusal

if TYPE_CHECKING:
    from acd_local.runtime.gguf_header import GGUFInfo

MAX_ROWS = 512  # of one prompt

Rows = NDArray[np.float32]


# --- Prompts and pairs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class SoftPrompt:
    """A system prompt as embedding rows. Equal if the rows are.

    Attributes:
        rows: float32, shape (n, n_embd), a read-only copy of what was given.
        digest: SHA-256 over shape and rows, hex.

    Raises:
        PairError: not a matrix, no row, more than MAX_ROWS, or a value that is not finite.
    """

    rows: Rows
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", _checked_rows(self.rows))
        what = str(self.rows.shape).encode() + self.rows.tobytes()
        object.__setattr__(self, "digest", hashlib.sha256(what).hexdigest())

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SoftPrompt) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"SoftPrompt(<{self.rows.shape[0]} rows of {self.rows.shape[1]}>)"


class AdversarialRows:
    """The adversarial soft prompt. No `SoftPrompt`, and nothing turns it into one but the accessor."""

    __slots__ = ("_prompt",)

    def __init__(self, rows: ArrayLike) -> None:
        self._prompt = SoftPrompt(rows)  # type: ignore[arg-type]

    def reveal_for_negative_stream(self) -> SoftPrompt:
        """Return the rows, for the negative stream and for writing or measuring a pair; never for a positive prompt."""
        return self._prompt

    @property
    def digest(self) -> str:
        """As a `SoftPrompt`'s."""
        return self._prompt.digest

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n_embd)."""
        return self._prompt.rows.shape[0], self._prompt.rows.shape[1]

    def __len__(self) -> int:
        return len(self._prompt)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdversarialRows) and self._prompt == other._prompt

    def __hash__(self) -> int:
        return hash(("adversarial", self.digest))

    def __repr__(self) -> str:
        return f"AdversarialRows(<{self.shape[0]} rows of {self.shape[1]}>)"


@dataclass(frozen=True, kw_only=True)
class ModelVectors:
    """Vectors that belong to one model.

    Attributes:
        architecture, tokenizer, n_embd, n_layer, name: of the model's GGUFInfo.
        path: their file; None if they were made in Python.
    """

    architecture: str
    tokenizer: str
    n_embd: int
    n_layer: int
    name: str = ""
    path: Path | None = field(default=None, compare=False)

    @staticmethod
    def fields_of(info: GGUFInfo) -> dict[str, Any]:
        """Return the fields for vectors of a model."""
        same = {key: getattr(info, key) for key in ("architecture", "tokenizer", "n_embd", "name")}
        return same | {"n_layer": info.n_layers}

    def check_model(self, what: str, info: GGUFInfo) -> None:
        """Compare the model that the vectors were made for with another.

        Raises:
            PairError: they are another model's; one line that calls them `what`.
        """
        where = f"{shown(self.path)}: " if self.path else ""
        made_for = f" ({shown(self.name)})" if self.name else ""
        for key, ours, its in (
            ("architecture", self.architecture, info.architecture),
            ("embedding width", self.n_embd, info.n_embd),
            ("number of layers", self.n_layer, info.n_layers),
            ("tokenizer", self.tokenizer[:12], info.tokenizer[:12]),
        ):
            if ours != its:
                raise PairError(
                    f"{where}{what}: made for another model{made_for}: {key} {shown(ours)}, this model has {shown(its)}"
                )


@dataclass(frozen=True)
class SoftPair(ModelVectors):
    """Both soft prompts of a model.

    Attributes:
        safe: positive stream. adversarial: negative stream.

    Raises:
        PairError: the widths do not agree, both prompts are the same, or a prompt is of the wrong type.
    """

    safe: SoftPrompt
    adversarial: AdversarialRows

    def __post_init__(self) -> None:
        if not isinstance(self.safe, SoftPrompt) or not isinstance(self.adversarial, AdversarialRows):
            raise PairError("a soft pair holds a SoftPrompt and AdversarialRows, in this order")
        for key, width in (("safe", self.safe.rows.shape[1]), ("adversarial", self.adversarial.shape[1])):
            if width != self.n_embd:
                raise PairError(f"{key}: the rows are {width} wide, n_embd says {self.n_embd}")
        if self.safe.digest == self.adversarial.digest:
            raise PairError("adversarial: has the same rows as safe: there would be nothing to contrast")

    def check(self, info: GGUFInfo) -> None:
        """Refuse a model that these rows do not belong to.

        Raises:
            PairError: they are another model's, or llama.cpp takes no rows for this architecture; one line.
        """
        self.check_model("soft prompts", info)
        if reason := refusal(info.architecture):
            where = f"{shown(self.path)}: " if self.path else ""
            raise PairError(f"{where}soft prompts do not work with {info.architecture} models: {reason}")


def _checked_rows(rows: Any) -> Rows:
    if isinstance(rows, AdversarialRows | SoftPrompt):
        raise PairError(f"rows must be an array, not {type(rows).__name__}")
    array = np.array(rows, dtype=np.float32, order="C")
    if array.ndim != 2:
        raise PairError(f"a soft prompt must be a matrix of rows, not of {array.ndim} dimensions")
    if not 1 <= array.shape[0] <= MAX_ROWS:
        raise PairError(f"a soft prompt has 1 to {MAX_ROWS} rows, not {array.shape[0]}")
    if array.shape[1] < 1:
        raise PairError("the rows of a soft prompt are empty")
    if not np.isfinite(array).all():
        raise PairError("a soft prompt holds a value that is not finite")
    array.setflags(write=False)
    return array

"""Soft pairs: the two system prompts as embedding rows instead of text, in one safetensors file beside the pair.

`NAME.safetensors` beside `NAME.toml` holds the tensors "safe" (n, n_embd) and "adversarial" (m, n_embd), float16, and
as metadata (strings): format = "acd-soft-pair", version = "1", and the model they belong to: architecture
(general.architecture), tokenizer (GGUFInfo.tokenizer), n_embd, n_layer, name (general.name).

Rows live in the space of the model's token embeddings as the GGUF stores them (token_embd.weight): a row equal to a
token's means that token. Where an architecture scales token embeddings, `runtime.rows` scales rows as much.

The adversarial rows have a type of their own, `AdversarialRows`: handing it to anything that takes a positive prompt is
an error for mypy and at run time. Needs numpy; safetensors is imported when a file is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from acd_local import files
from acd_local.errors import PairError, printable
from acd_local.runtime.rows import refusal

if TYPE_CHECKING:
    from acd_local.runtime.gguf_header import GGUFInfo

__all__ = ["FORMAT", "MAX_ROWS", "VERSION", "AdversarialRows", "SoftPair", "SoftPrompt", "load", "save"]

FORMAT = "acd-soft-pair"
VERSION = "1"
MAX_ROWS = 512  # of one prompt
MAX_BYTES = 100_000_000
_MAX_TEXT = 1000  # characters of a metadata value
_TENSORS = ("safe", "adversarial")
_TEXTS = ("format", "version", "architecture", "tokenizer", "n_embd", "n_layer", "name")

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
        """The rows, for the negative stream and for writing or measuring a pair; never for a positive prompt."""
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


@dataclass(frozen=True)
class SoftPair:
    """Both soft prompts, and the model they belong to.

    Attributes:
        safe: positive stream. adversarial: negative stream.
        architecture, tokenizer, n_embd, n_layer, name: of the model's GGUFInfo.
        path: its file; None if it was made in Python.

    Raises:
        PairError: the widths do not agree, both prompts are the same, or a prompt is of the wrong type.
    """

    safe: SoftPrompt
    adversarial: AdversarialRows
    architecture: str
    tokenizer: str
    n_embd: int
    n_layer: int
    name: str = ""
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.safe, SoftPrompt) or not isinstance(self.adversarial, AdversarialRows):
            raise PairError("a soft pair holds a SoftPrompt and AdversarialRows, in this order")
        for key, width in (("safe", self.safe.rows.shape[1]), ("adversarial", self.adversarial.shape[1])):
            if width != self.n_embd:
                raise PairError(f"{key}: the rows are {width} wide, n_embd says {self.n_embd}")
        if self.safe.digest == self.adversarial.digest:
            raise PairError("adversarial: has the same rows as safe: there would be nothing to contrast")

    def check(self, info: GGUFInfo) -> None:
        """Whether these rows can stand in front of this model.

        Raises:
            PairError: they are another model's, or llama.cpp takes no rows for this architecture; one line.
        """
        where = f"{printable(str(self.path))}: " if self.path else ""
        made_for = f" ({printable(self.name)})" if self.name else ""
        for key, ours, its in (
            ("architecture", self.architecture, info.architecture),
            ("embedding width", self.n_embd, info.n_embd),
            ("number of layers", self.n_layer, info.n_layers),
            ("tokenizer", self.tokenizer[:12], info.tokenizer[:12]),
        ):
            if ours != its:
                raise PairError(
                    f"{where}the soft prompts were made for another model{made_for}: {key} {printable(str(ours))}, "
                    f"this model has {printable(str(its))}"
                )
        if reason := refusal(info.architecture):
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


# --- Files ------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], *, sha256: str = "") -> SoftPair:
    """Read and check one soft pair.

    Args:
        sha256: of the file that is wanted, as the pair's TOML says it; empty: any.

    Raises:
        PairError: one line with the file and what is wrong with it.
    """
    shown = printable(os.fspath(path))
    try:
        return _parse(Path(path), sha256)
    except PairError as error:
        raise PairError(f"{shown}: {error}") from None


def _parse(path: Path, sha256: str) -> SoftPair:
    data = _read(path)
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        toml = printable(path.with_suffix(".toml").name)
        raise PairError(f"not the soft prompts that {toml} was written with: copy both files again, or make them anew")
    from safetensors.numpy import load as parse

    try:
        tensors = parse(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except Exception as error:  # the parser raises its own error, and whatever numpy says to a type it does not know
        text = " ".join(str(error).split())[:200]
        raise PairError(f"damaged, or no safetensors file ({printable(text)})") from None
    texts = _checked_texts(header.get("__metadata__"))
    if sorted(tensors) != sorted(_TENSORS):
        raise PairError(f"must hold the tensors safe and adversarial, not {printable(', '.join(sorted(tensors)))[:80]}")
    for key, tensor in tensors.items():
        if tensor.dtype not in (np.float16, np.float32):
            raise PairError(f"{key}: must be float16, not {tensor.dtype}")
    return SoftPair(
        safe=_named("safe", SoftPrompt, tensors["safe"]),
        adversarial=_named("adversarial", AdversarialRows, tensors["adversarial"]),
        architecture=texts["architecture"],
        tokenizer=texts["tokenizer"],
        n_embd=_count("n_embd", texts["n_embd"]),
        n_layer=_count("n_layer", texts["n_layer"]),
        name=texts["name"],
        path=path,
    )


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise PairError("not a file" if path.exists() else "no such file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PairError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise PairError(f"larger than {MAX_BYTES // 1_000_000} MB: this is no soft pair")
    return data


def _checked_texts(found: object) -> dict[str, str]:
    texts = found if isinstance(found, dict) else {}
    if texts.get("format") != FORMAT:
        raise PairError(f"no soft pair: its metadata does not say format = {FORMAT}")
    if texts.get("version") != VERSION:
        shown = printable(str(texts.get("version")))[:40]
        raise PairError(f"version {shown} of the format is not the one this acd-local reads ({VERSION})")
    for key in _TEXTS:
        value = texts.get(key)
        if not isinstance(value, str) or len(value) > _MAX_TEXT or (not value and key != "name"):
            raise PairError(f"metadata {key}: missing, or no text")
    return texts


def _count(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise PairError(f"metadata {key}: must be a whole number, not {printable(text)[:40]!r}")
    return int(text)


def _named(key: str, make: Any, tensor: NDArray[Any]) -> Any:
    try:
        return make(tensor)
    except PairError as error:
        raise PairError(f"{key}: {error}") from None


def save(pair: SoftPair, path: str | os.PathLike[str]) -> None:
    """Write a soft pair, whole or not at all; values are rounded to float16. The same pair gives the same bytes.

    Raises:
        PairError: a value is beyond float16's range.
        UsageError, StorageError: the file cannot be written.
    """
    from safetensors.numpy import save as serialize

    with np.errstate(over="ignore"):
        tensors = {
            "safe": pair.safe.rows.astype(np.float16),
            "adversarial": pair.adversarial.reveal_for_negative_stream().rows.astype(np.float16),
        }
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise PairError("a soft prompt holds a value beyond the range of float16")
    values = {"format": FORMAT, "version": VERSION, "architecture": pair.architecture, "tokenizer": pair.tokenizer}
    values |= {"n_embd": str(pair.n_embd), "n_layer": str(pair.n_layer), "name": pair.name[:_MAX_TEXT]}
    files.replace_file(Path(path), _in_order(serialize(tensors, metadata=_checked_texts(values))))


def _in_order(data: bytes) -> bytes:
    """The file with its header's keys sorted: the library writes metadata in an order that changes by process."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[end:]

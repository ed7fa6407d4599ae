"""The vectors of a pair: soft prompts, gate and steering vectors, in one safetensors file beside it.

`NAME.safetensors` beside `NAME.toml` holds, float16, the soft prompts "safe" (n, n_embd) and "adversarial" (m, n_embd),
and, float32, the gate's probes "gate.request.weight" (layers, n_embd), "gate.request.bias" (1,), "gate.answer.weight"
and "gate.answer.bias", and the vectors "steering" (n_layer - 1, n_embd); any part may be missing, but steering vectors
stand beside a gate. Its metadata (strings) say format = "acd-vectors", version = "1",
the model they belong to: architecture (general.architecture), tokenizer (GGUFInfo.tokenizer), n_embd, n_layer, name
(general.name), and where there is a gate its layers, by commas.

safetensors is imported when a file is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acd_local import files
from acd_local.errors import PairError, shown
from acd_local.gate import Gate, probe_of
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt
from acd_local.steering import Steering

FORMAT = "acd-vectors"
VERSION = "1"
MAX_BYTES = 100_000_000
_MAX_TEXT = 1000  # characters of a metadata value
_SOFT = ("safe", "adversarial")
_REQUEST = ("gate.request.weight", "gate.request.bias")
_ANSWER = ("gate.answer.weight", "gate.answer.bias")
_STEERING = ("steering",)
_TEXTS = ("format", "version", "architecture", "tokenizer", "n_embd", "n_layer", "name")


@dataclass(frozen=True)
class Vectors:
    """The contents of a file; soft prompts or a gate at least."""

    soft: SoftPair | None
    gate: Gate | None
    steering: Steering | None = None


def load(path: str | os.PathLike[str], *, sha256: str = "") -> Vectors:
    """Read and check one file.

    Args:
        sha256: of the file that is wanted, as the pair's TOML says it; empty: any.

    Raises:
        PairError: one line with the file and what is wrong with it.
    """
    path = Path(path)
    data = _read(path)
    try:
        return _parse(path, data, sha256)
    except PairError as error:
        raise PairError(f"{shown(path)}: {error}") from None


def _parse(path: Path, data: bytes, sha256: str) -> Vectors:
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        toml = shown(path.with_suffix(".toml").name)
        raise PairError(f"not the vectors that {toml} was written with: copy both files again, or make them anew")
    from safetensors.numpy import load as parse

    try:
        tensors = parse(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except Exception as error:  # the parser raises its own error, and whatever numpy says to a type it does not know
        text = " ".join(str(error).split())[:200]
        raise PairError(f"damaged, or no safetensors file ({shown(text)})") from None
    texts = _checked_texts(header.get("__metadata__"))
    model = {
        "architecture": texts["architecture"],
        "tokenizer": texts["tokenizer"],
        "n_embd": _count("n_embd", texts["n_embd"]),
        "n_layer": _count("n_layer", texts["n_layer"]),
        "name": texts["name"],
        "path": path,
    }
    for key, tensor in tensors.items():
        if tensor.dtype not in (np.float16, np.float32):
            raise PairError(f"{key}: must be float16 or float32, not {tensor.dtype}")
    found = set(tensors)
    soft, steering = found & {*_SOFT}, found & {*_STEERING}
    gate = found - {*_SOFT, *_STEERING}
    if steering and not gate:
        raise PairError("holds steering vectors without a gate")
    if soft not in (set(), {*_SOFT}) or gate not in (set(), {*_REQUEST}, {*_REQUEST, *_ANSWER}) or not found:
        raise PairError(
            f"must hold soft prompts ({', '.join(_SOFT)}) or a gate ({', '.join(_REQUEST)}), not "
            f"{shown(', '.join(sorted(found)), 80) or 'nothing'}"
        )
    return Vectors(
        soft=_soft_pair(tensors, model) if soft else None,
        gate=_gate(tensors, _layers(texts.get("layers", "")), model) if gate else None,
        steering=_steering(tensors["steering"], model) if steering else None,
    )


def _soft_pair(tensors: Mapping[str, NDArray[Any]], model: Mapping[str, Any]) -> SoftPair:
    safe, adversarial = (tensors[key] for key in _SOFT)
    return SoftPair(_named("safe", SoftPrompt, safe), _named("adversarial", AdversarialRows, adversarial), **model)


def _layers(text: str) -> tuple[int, ...]:
    return tuple(_count("layers", part) for part in text.split(","))


def _gate(tensors: Mapping[str, NDArray[Any]], layers: tuple[int, ...], model: Mapping[str, Any]) -> Gate:
    request = _named("gate.request", probe_of, *(tensors[key] for key in _REQUEST))
    read = _ANSWER[0] in tensors
    answer = _named("gate.answer", probe_of, *(tensors[key] for key in _ANSWER)) if read else None
    return Gate(layers, request, answer, **model)


def _steering(added: NDArray[Any], model: Mapping[str, Any]) -> Steering:
    return Steering(added, **model)


def _read(path: Path) -> bytes:
    with suppress(OSError, ValueError):
        if not path.is_file():
            raise PairError(f"{shown(path)}: {'not a file' if path.exists() else 'no such file'}")
    return files.read_bytes(path, MAX_BYTES, "these are no vectors of a pair", PairError)


def _checked_texts(found: object) -> dict[str, str]:
    texts = found if isinstance(found, dict) else {}
    if texts.get("format") != FORMAT:
        raise PairError(f"no vectors of a pair: its metadata does not say format = {FORMAT}")
    if texts.get("version") != VERSION:
        version = shown(texts.get("version"), 40)
        raise PairError(f"version {version} of the format is not the one this acd-local reads ({VERSION})")
    for key in _TEXTS:
        value = texts.get(key)
        if not isinstance(value, str) or len(value) > _MAX_TEXT or (not value and key != "name"):
            raise PairError(f"metadata {key}: missing, or no text")
    return texts


def _count(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise PairError(f"metadata {key}: must be a whole number, not {shown(text, 40)!r}")
    return int(text)


def _named(key: str, make: Any, *tensors: NDArray[Any]) -> Any:
    try:
        return make(*tensors)
    except PairError as error:
        raise PairError(f"{key}: {error}") from None


def save(vectors: Vectors, path: str | os.PathLike[str]) -> None:
    """Write them, whole or not at all; rows are rounded to float16. The same gives the same bytes.

    Raises:
        PairError: there is nothing to write, the parts belong to different models, or a row's value is beyond float16's
            range.
        UsageError, StorageError: the file cannot be written.
    """
    from safetensors.numpy import save as serialize

    values = _texts_of(vectors)
    tensors: dict[str, NDArray[Any]] = {}
    if vectors.soft is not None:
        rows = vectors.soft.safe.rows, vectors.soft.adversarial.reveal_for_negative_stream().rows
        with np.errstate(over="ignore"):
            tensors |= {key: r.astype(np.float16) for key, r in zip(_SOFT, rows, strict=True)}
        if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
            raise PairError("a soft prompt holds a value beyond the range of float16")
    if vectors.gate is not None:
        for keys, probe in ((_REQUEST, vectors.gate.request), (_ANSWER, vectors.gate.answer)):
            if probe is not None:
                tensors |= zip(keys, (probe.weight, np.array([probe.bias], np.float32)), strict=True)
    if vectors.steering is not None:
        if vectors.gate is None:
            raise PairError("steering vectors stand beside a gate, and there is none")
        tensors["steering"] = vectors.steering.added
    files.replace_file(Path(path), _in_order(serialize(tensors, metadata=_checked_texts(values))))


def _texts_of(vectors: Vectors) -> dict[str, str]:
    """Make the metadata: format, and the model that the parts belong to."""
    models = {
        (part.architecture, part.tokenizer, part.n_embd, part.n_layer, part.name[:_MAX_TEXT])
        for part in (vectors.soft, vectors.gate, vectors.steering)
        if part is not None
    }
    if len(models) != 1:
        raise PairError("the parts belong to different models" if models else "there are no vectors")
    architecture, tokenizer, n_embd, n_layer, name = models.pop()
    values = {"format": FORMAT, "version": VERSION, "architecture": architecture, "tokenizer": tokenizer}
    values |= {"n_embd": str(n_embd), "n_layer": str(n_layer), "name": name}
    return values if vectors.gate is None else values | {"layers": ",".join(map(str, vectors.gate.layers))}


def _in_order(data: bytes) -> bytes:
    """Sort the header's keys: the library writes metadata in an order that changes by process."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[end:]

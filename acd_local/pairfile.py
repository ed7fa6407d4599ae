"""Writes a pair's files: NAME.toml with the texts, NAME.safetensors with the vectors, NAME.report.html."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acd_local import files, pairs
from acd_local import vectors as vectors_
from acd_local.errors import AcdError, InternalError, UsageError
from acd_local.pairs import GateSettings
from acd_local.vectors import Vectors

if TYPE_CHECKING:
    from acd_local.runtime.gguf_header import GGUFInfo

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


@dataclass(frozen=True)
class PairFile:
    """What NAME.toml says; see `acd_local.pairs`. `None` in a table is left out."""

    name: str
    safe: str
    adversarial: str
    alpha: float | None
    beta: float | None
    soft: Mapping[str, Any]
    models: Mapping[str, Any]
    provenance: Mapping[str, Any]
    figures: Mapping[str, Any]
    gate: Mapping[str, Any] = field(default_factory=dict)
    shots: tuple[tuple[str, str], ...] = ()
    sha256: str = ""  # of the vectors' file; filled in by `write`
    made_by: str = "acd optimize"


def models_table(info: GGUFInfo) -> dict[str, Any]:
    """The [models] of a pair that is fitted to a model, see `pairs.fitted`."""
    return {
        "architecture": info.architecture,
        "tokenizer": info.tokenizer,
        "names": [info.name] if info.name.strip() else [],
        "n_layers": info.n_layers,
        "n_embd": info.n_embd,
    }


def gate_table(gate: GateSettings | None) -> dict[str, Any]:
    """The [gate] of a pair, which gives the settings back; empty: none."""
    if gate is None:
        return {}
    table: dict[str, Any] = {"threshold": gate.threshold}
    if gate.helpful is not None:
        table |= {"helpful": gate.helpful, "low": gate.low}
    if gate.look:
        table |= {"look": gate.look, "answer_threshold": gate.answer_threshold}
    return table


def check_target(path: Path, *, force: bool) -> None:
    """Whether the result can be written to `path` (NAME.toml), before there is one. Its folder may be missing.

    Raises:
        UsageError, StorageError: it cannot, or a file would be overwritten without `force`.
    """
    shown = path.name
    if path.suffix != ".toml":
        raise UsageError(f"-o must end in .toml, such as prompts/my-model.toml, not {shown!r}")
    try:
        pairs.PromptPair(path.stem, "a", pairs.AdversarialText("b"))
    except AcdError:
        raise UsageError(
            f"-o: {path.stem!r} is no pair name: up to 64 of A-Z a-z 0-9 . _ -, letter or digit first"
        ) from None
    try:
        for file in outputs(path):
            if os.path.lexists(file) and not (force and file.is_file()):
                advice = "give --force to replace it, or another name with -o" if file.is_file() else "it is no file"
                raise UsageError(f"{file} is there already: {advice}")
        folder = next(p for p in path.absolute().parents if p.exists())
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".acd-"):
            pass
    except (OSError, ValueError) as error:
        known = files.write_error(path, error)
        raise type(known)(f"{known}: give another place with -o") from None


def outputs(path: Path) -> tuple[Path, Path, Path]:
    """The pair's file, its vectors, and the report."""
    return path, path.with_suffix(".safetensors"), path.with_name(f"{path.stem}.report.html")


def write(path: Path, pair: PairFile, vectors: Vectors, report: str) -> None:
    """All three files, each whole or not at all, after they were found good where nobody looks for pairs.

    Raises:
        UsageError, StorageError: they cannot be written.
        InternalError: they do not read back; nothing was replaced.
    """
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}."))
        toml, rows, page = (draft / file.name for file in outputs(path))
        page.write_bytes(report.encode())
        vectors_.save(vectors, rows)
        pair = replace(pair, sha256=hashlib.sha256(rows.read_bytes()).hexdigest())
        toml.write_bytes(as_toml(pair).encode())
        _check(toml, rows, pair)
        for made, target in zip((toml, rows, page), outputs(path), strict=True):
            files.move_file(made, target)  # the pair first: its SHA-256 keeps older vectors from being taken for new
    except (OSError, ValueError) as error:
        raise files.write_error(path, error) from None
    finally:
        if draft is not None:
            with suppress(OSError):
                shutil.rmtree(draft)


def _check(toml: Path, rows: Path, pair: PairFile) -> None:
    try:
        found = pairs.load(toml)
        vectors_.load(rows, sha256=found.sha256)
    except AcdError as error:
        raise InternalError(f"the result is no valid pair: {error}") from None
    texts = found.safe, found.adversarial.reveal_for_negative_stream()
    if texts != (pair.safe.strip(), pair.adversarial.strip()):
        raise InternalError("the result does not read back as it was written")


# --- TOML -------------------------------------------------------------------------------------------------------------


def as_toml(pair: PairFile) -> str:
    """The pair's file."""
    lines = [f"# Made by {pair.made_by}.", f"format = {pairs.FORMAT}", f"name = {_string(pair.name)}", ""]
    lines += [f"safe = {_text(pair.safe)}", ""]
    lines += [
        "# The negative reference: nothing is ever sampled from it.",
        f"adversarial = {_text(pair.adversarial)}",
        "",
    ]
    numbers = {"alpha": pair.alpha, "beta": pair.beta, "sha256": pair.sha256 or None}
    lines += _table(numbers)
    for user, assistant in pair.shots:
        lines += ["", "[[shots]]", f"user = {_string(user)}", f"assistant = {_string(assistant)}"]
    for name in ("soft", "gate", "models", "provenance", "figures"):
        if table := getattr(pair, name):
            lines += ["", f"[{name}]", *_table(table)]
    return "\n".join(lines) + "\n"


def _table(table: Mapping[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        if value is not None:
            yield f"{_key(key)} = {_value(value)}"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(round(value, 6))
    if isinstance(value, int | date):
        return str(value)
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return _string(str(value))


def _string(text: str) -> str:
    """A basic string on one line."""
    return f'"{"".join(map(_escaped, text))}"'


def _text(text: str) -> str:
    """A multi-line basic string, a line of text a line of the file."""
    body = "".join(c if c == "\n" else _escaped(c) for c in text)
    return f'"""\n{body}\\\n"""'  # the backslash takes the last line break out of the value


def _escaped(c: str) -> str:
    if c in _ESCAPES:
        return _ESCAPES[c]
    return c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"

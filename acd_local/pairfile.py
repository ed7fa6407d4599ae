"""Writes a pair's files: NAME.toml with the texts, NAME.safetensors with the vectors, NAME.report.html."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomlkit

from acd_local import files, pairs
from acd_local import vectors as vectors_
from acd_local.errors import AcdError, InternalError, StorageError, UsageError
from acd_local.pairs import GateSettings
from acd_local.vectors import Vectors

if TYPE_CHECKING:
    from acd_local.runtime.gguf_header import GGUFInfo


@dataclass(frozen=True)
class PairFile:
    """The contents of NAME.toml; see `acd_local.pairs`. `None` in a table is left out."""

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
    """Make the [models] of a pair that is fitted to a model, see `pairs.fitted`."""
    return {
        "architecture": info.architecture,
        "tokenizer": info.tokenizer,
        "names": [info.name] if info.name.strip() else [],
        "n_layers": info.n_layers,
        "n_embd": info.n_embd,
    }


def gate_table(gate: GateSettings | None) -> dict[str, Any]:
    """Make the [gate] of a pair, which gives the settings back; empty: none."""
    if gate is None:
        return {}
    table: dict[str, Any] = {"threshold": gate.threshold}
    if gate.helpful is not None:
        table |= {"helpful": gate.helpful, "low": gate.low}
    if gate.look:
        table |= {"look": gate.look, "answer_threshold": gate.answer_threshold}
    return table


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a `path` (NAME.toml) that a result cannot be written to, before there is one; its folder may be missing.

    What a killed run had begun to put there is put there first.

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
        if _finish(path) and not force:
            raise UsageError(f"{path}: a run was killed as it wrote this: it is whole now, --force makes it anew")
        for file in outputs(path):
            if os.path.lexists(file) and not (force and file.is_file()):
                advice = "give --force to replace it, or another name with -o" if file.is_file() else "it is no file"
                raise UsageError(f"{file} is there already: {advice}")
        folder = next(p for p in path.absolute().parents if p.exists())
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".acd-", suffix=".tmp"):  # as drafts are named
            pass
    except (OSError, ValueError) as error:
        known = files.write_error(path, error)
        otherwise = ", or" if isinstance(known, StorageError) else ":"
        raise type(known)(f"{known}{otherwise} give another place with -o") from None


def outputs(path: Path) -> tuple[Path, Path, Path]:
    """List the pair's file, its vectors, and the report."""
    return path, path.with_suffix(".safetensors"), path.with_name(f"{path.stem}.report.html")


def write(path: Path, pair: PairFile, vectors: Vectors, report: str) -> None:
    """Write all three files, each whole or not at all, after they were found good where nobody looks for pairs.

    Killed in between, it has left a folder `.NAME.acd`, from which `check_target` goes on.

    Raises:
        UsageError, StorageError: they cannot be written.
        InternalError: they do not read back; nothing was replaced.
    """
    folder = _draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
        toml, rows, page = outputs(folder / path.name)
        vectors_.save(vectors, rows)
        pair = replace(pair, sha256=_sha256(rows))
        files.replace_file(toml, as_toml(pair))
        _check(toml, rows, pair)
        files.replace_file(page, report)  # the last: see _is_begun
        _move(path)
    except (OSError, ValueError) as error:
        raise files.write_error(path, error) from None
    finally:
        if not _is_begun(path):
            shutil.rmtree(folder, ignore_errors=True)


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.stem}.acd")


def _move(path: Path) -> None:
    """Move what the draft holds; the pair first: its SHA-256 keeps older vectors from being taken for new."""
    for target in outputs(path):
        if (made := _draft(path) / target.name).exists():
            files.move_file(made, target)


def _is_begun(path: Path) -> bool:
    """Whether the pair is in its place, and the rest still in the draft."""
    toml, _, page = outputs(_draft(path) / path.name)
    return page.exists() and not toml.exists()


def _finish(path: Path) -> bool:
    """Go on where a process was killed within `_move`; whether it was, and the files are now in their place."""
    if not _is_begun(path):
        return False
    rows = _draft(path) / path.with_suffix(".safetensors").name
    try:
        ours = not rows.exists() or pairs.load(path).sha256 == _sha256(rows)
    except AcdError:
        ours = False  # since then somebody has put something else there
    if ours:
        _move(path)
        shutil.rmtree(rows.parent)
    return ours


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    """Write the pair as TOML: texts line by line, each of the tables' values on one line, no character that hides."""
    file = tomlkit.document()
    file.add(tomlkit.comment(f"Made by {pair.made_by}."))
    file.update({"format": pairs.FORMAT, "name": pair.name})
    file.add(tomlkit.nl())
    file.add("safe", tomlkit.string(pair.safe, multiline=True))
    file.add(tomlkit.nl())
    file.add(tomlkit.comment("The negative reference: nothing is ever sampled from it."))
    file.add("adversarial", tomlkit.string(pair.adversarial, multiline=True))
    file.add(tomlkit.nl())
    file.update(_known({"alpha": pair.alpha, "beta": pair.beta, "sha256": pair.sha256 or None}))
    if pair.shots:
        turns = tomlkit.aot()
        for user, assistant in pair.shots:
            turns.append(tomlkit.item({"user": user, "assistant": assistant}))
        file.add("shots", turns)
    for name in ("soft", "gate", "models", "provenance", "figures"):
        if table := _known(getattr(pair, name)):
            file.add(tomlkit.nl())
            file.add(name, tomlkit.item(table))
    text = file.as_string()
    return "".join(c if c == "\n" or c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def _known(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _value(value) for key, value in table.items() if value is not None}


def _value(value: object) -> Any:
    if isinstance(value, Mapping):
        inside = tomlkit.inline_table()
        inside.update(_known(value))
        return inside
    if isinstance(value, float):
        return round(value, 6)
    return [_value(item) for item in value] if isinstance(value, list | tuple) else value

"""Reads and changes the user's settings, config.toml in the user's configuration folder.

The command line takes them where neither an option nor an environment variable says otherwise. They may be

    model = "coder"             # MODEL where a command names none: an alias, a path, "demo" or "hf:..."
    pair = "as-is"              # --pair of acd-run, acd-chat and acd-serve
    threads = 4                 # --threads
    ctx_size = 8192             # --ctx-size of the same three
    gate = false                # contrast every answer, as --gate off; true is the default
    [models]                    # aliases: what may be written as MODEL, for a file's path, "demo" or "hf:..."
    coder = "~/models/qwen2.5-coder-0.5b.gguf"

In Python the aliases alone count: a program does not change with the user's file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acd_local import files
from acd_local.errors import UsageError, shown
from acd_local.options import check_engine_number, check_unicode, refuse_unknown

if TYPE_CHECKING:
    from tomlkit import TOMLDocument

KEYS = ("model", "pair", "threads", "ctx_size", "gate")
ALIASES = "models"
FILE = "config.toml"
MAX_BYTES = 1_000_000
_PATIENCE = 10.0  # seconds that another process may take to change the file
_HEAD = "# Settings of acd-local; `acd config` says what holds, `acd config set KEY VALUE` changes this file.\n"
_ALIAS = re.compile(r"(?!demo$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?<!\.gguf)")


@dataclass(frozen=True)
class Settings:
    """The settings of one file, checked.

    Attributes:
        path: the file; None where there is no configuration folder.
        source: its text, empty where there is no file.
        models: what each alias stands for.
    """

    path: Path | None
    source: str = ""
    model: str | None = None
    pair: str | None = None
    threads: int | None = None
    ctx_size: int | None = None
    gate: bool | None = None
    models: Mapping[str, str] = field(default_factory=dict)

    def line(self, key: str) -> int | None:
        """Return the line where a setting stands, "models.coder" for an alias; None: nowhere."""
        return _line(self.source, key)

    def place(self, key: str) -> str:
        """Name the place of a setting, in front of what is wrong with it."""
        return _place(self.path, self.source, key)


def path() -> Path | None:
    """Return where the settings are, or would be; None: this user has no configuration folder."""
    folder = files.config_dir()
    return None if folder is None else folder / FILE


def read() -> Settings:
    """Read the settings; where there is no file, none is set.

    Raises:
        UsageError: one line with file, line and key.
    """
    where, source = path(), _source()
    return _checked(where, source) if source else Settings(where)


def alias(name: str) -> tuple[str, Settings] | None:
    """Return what an alias stands for, and the settings that say so; None: `name` is no alias.

    What cannot be one, such as a path, does not even open the file.

    Raises:
        UsageError: the file is broken.
    """
    if not _ALIAS.fullmatch(name):
        return None
    found = read()
    return (found.models[name], found) if name in found.models else None


def default_model() -> tuple[str, str] | None:
    """Return MODEL where a command names none, and who says so: $ACD_MODEL, else the settings; None: nobody.

    Raises:
        UsageError: the file is broken.
    """
    if chosen := os.environ.get("ACD_MODEL"):
        return chosen, "ACD_MODEL is set"
    found = read()
    return (found.model, f"{shown(found.path)} sets a model") if found.model else None


# --- Changing the file ------------------------------------------------------------------------------------------------


def set_value(key: str, value: str | int | bool) -> Path:
    """Set a value, and keep all else of the file with its comments; returns the file.

    Args:
        key: one of KEYS, or "models.NAME" for an alias.

    Raises:
        UsageError, StorageError: key, value or file is bad, or cannot be written; the file stays as it is.
    """
    name = alias_of(key)
    if name is None:
        refuse_unknown([key], KEYS)
        _check(key, value)
    else:
        _check_alias(name, value)
    with _changing() as (where, document):
        table = document
        if name is not None:
            if not isinstance(document.get(ALIASES, {}), Mapping):
                _checked(where, document.as_string())  # says what it is
            table = document.setdefault(ALIASES, {})
        table[name or key] = value
        _write(where, document, _HEAD)
        return where


def unset(key: str) -> Path:
    """Remove a setting, or a key that is none, and keep all else; returns the file.

    Raises:
        UsageError, StorageError: it is not set, or the file cannot be read or written.
    """
    with _changing() as (where, document):
        name = alias_of(key)
        table = document if name is None else document.get(ALIASES, {})
        if (name or key) not in table:
            raise UsageError(f"{shown(key, 80)} is not set in {shown(where)}")
        del table[name or key]
        if name is not None and not table:
            del document[ALIASES]
        _write(where, document)
        return where


@contextmanager
def _changing() -> Iterator[tuple[Path, TOMLDocument]]:
    """Lend the file's path and text to one process at a time, where its folder can hold a lock file."""
    import tomlkit  # slow to import

    where = path()
    if where is None:
        raise UsageError("this user has no configuration folder: set ACD_CONFIG_DIR to one")
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.write_error(where.parent, error) from None
    with ExitStack() as stack:
        if os.access(where.parent, os.W_OK):
            taken = f"{shown(where)} is being changed by another process"
            stack.enter_context(files.locked(where.with_name(f".{FILE}.lock"), taken, patience=_PATIENCE))
        source = _source()
        if source:
            _parsed(where, source)  # says what is wrong with the text
        try:
            document = tomlkit.parse(source)
        except (ValueError, RecursionError) as error:  # lists in lists a hundred times, which Python can read
            raise UsageError(f"{shown(where)}: cannot be changed: {shown(str(error), 200)}") from None
        yield where, document


def _write(where: Path, document: TOMLDocument, head: str = "") -> None:
    text = document.as_string()
    if head:
        try:
            _checked(where, text)  # nothing that would be refused is written
        except UsageError:
            _checked(where, _source())  # whose lines are those that the user sees
            raise
        text = text if where.exists() else head + text
    files.replace_file(where, text)


def alias_of(key: str) -> str | None:
    """Return the alias that "models.NAME" speaks of."""
    table, dot, name = key.partition(".")
    return name if dot and table == ALIASES else None


# --- Reading and checking ---------------------------------------------------------------------------------------------


def _source() -> str:
    where = path()
    if where is None or not os.path.lexists(where):
        return ""
    return files.read_text(where, MAX_BYTES, "these are no settings")


def _parsed(where: Path | None, source: str) -> dict[str, Any]:
    import tomllib  # slow to import, and mostly there is no file

    try:
        return tomllib.loads(source)
    except (ValueError, RecursionError) as error:
        from acd_local.pairs import syntax_message

        raise UsageError(syntax_message(Path(str(where)), source, error)) from None


@lru_cache(maxsize=2)  # a command asks for several settings
def _checked(where: Path | None, source: str) -> Settings:
    found = _parsed(where, source)
    for key, value in found.items():
        try:
            _check(key, value)
        except UsageError as error:
            raise UsageError(f"{_place(where, source, key)}: {error}") from None
    aliases = found.pop(ALIASES, {})
    for name, target in aliases.items():
        try:
            _check_alias(name, target)
        except UsageError as error:
            raise UsageError(f"{_place(where, source, f'{ALIASES}.{name}')}: {error}") from None
    return Settings(where, source, **found, models=aliases)


def _check(key: str, value: object) -> None:
    if key in ("threads", "ctx_size"):
        check_engine_number(key, value)
    elif key == "gate":
        if not isinstance(value, bool):
            raise UsageError(f"gate must be true or false, not {_said(value)}")
    elif key in ("model", "pair"):
        if not isinstance(value, str) or not value:
            raise UsageError(f"{key} must be a name or a path as a string, not {_said(value)}")
        check_unicode(key, value)
    elif key == ALIASES:
        if not isinstance(value, dict):
            raise UsageError(f"{ALIASES} must be a table of aliases, [{ALIASES}], not {_said(value)}")
    else:
        refuse_unknown([key], (*KEYS, ALIASES))


def _check_alias(name: str, target: object) -> None:
    if not _ALIAS.fullmatch(name):
        raise UsageError(
            f"{shown(name, 80)!r} cannot be an alias: up to 64 of A-Z a-z 0-9 . _ -, letter or digit first, not demo, "
            "not ending in .gguf"
        )
    if isinstance(target, dict):
        raise UsageError(f"the alias {name!r} must stand for a string; a name with a dot needs quotes")
    if not isinstance(target, str):
        raise UsageError(f"the alias {name!r} must stand for a string, not {_said(target)}")
    check_unicode(f"what the alias {name!r} stands for", target)
    if target != "demo" and not target.startswith(("hf:", "~")) and not Path(target).is_absolute():
        raise UsageError(f"the alias {name!r} must stand for an absolute path, one from ~ on, demo or hf:...")


def _said(value: object) -> str:
    from acd_local.pairs import toml_kind

    return shown(repr(value), 80) if isinstance(value, str) else toml_kind(value)


def _line(source: str, key: str) -> int | None:
    from acd_local.pairs import line_of

    return line_of(source, key)


def _place(where: Path | None, source: str, key: str) -> str:
    line = _line(source, key)
    return shown(where) + (f": line {line}" if line else "")

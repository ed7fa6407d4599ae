"""Writes and reads files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import SHARED

from acd_local.errors import UsageError
from acd_local.evaluate import sets
from acd_local.evaluate.sets import EvalSet, Item

needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the published sets are not here")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_one(path: Path, after: str = ":harmless") -> EvalSet:
    (only,) = sets.read(f"s={path}{after}")
    return only


def prompts(path: Path, after: str = ":harmless") -> list[str]:
    return [item.prompt for item in read_one(path, after).items]


def refusal(path: Path, after: str = ":harmless") -> str:
    """The one line a file is refused with, without its path."""
    with pytest.raises(UsageError) as caught:
        sets.read(f"s={path}{after}")
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message and message.isprintable() and len(message) < 1000
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def made(count: int) -> EvalSet:
    return EvalSet("m", "harmless", tuple(Item(f"{i * 7919:016x}", f"prompt {i}") for i in range(count)), "made")

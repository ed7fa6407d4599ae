"""Tell PyInstaller what a frozen application takes along (entry point `pyinstaller40`, `hook-dirs`)."""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """Return the folders with hook-*.py and rthooks.dat."""
    return [str(Path(__file__).parent)]

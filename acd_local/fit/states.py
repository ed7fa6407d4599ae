"""Reads hidden states of many conversations into a file that grows by some means at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from acd_local import files
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.reading import Reader
from acd_local.tuning.progress import check_stop

Floats = NDArray[np.float32]
Row = TypeVar("Row")
Located = tuple[Sequence[int], int]

# Parts of the depth whose layers are read. Requests differ most in the middle, the last layers know the next word.
DEPTHS = (0.4, 0.45, 0.5, 0.55, 0.6)
_AT_ONCE = 32  # means that are written together


def layers_of(n_layers: int) -> tuple[int, ...]:
    """The layers that are compared: from 0, in order, never the last one; empty where there is none to read."""
    return tuple(sorted({min(round(depth * n_layers), n_layers - 2) for depth in DEPTHS if n_layers > 1}))


def read_all(
    path: Path,
    rows: Sequence[Row],
    locate: Callable[[Row], Located],
    reader: Callable[[], Reader],
    shape: tuple[int, int],
    *,
    stop: CancelToken,
    on_progress: Callable[[int], None],
) -> Floats:
    """The mean states of all rows, float32, shape (rows, layers, n_embd).

    Args:
        path: holds the means of the first rows, from an earlier call with the same ones.
        locate: a row's tokens, and where those begin whose mean is taken.
        reader: asked for where something is left to read; closed afterwards.
        shape: (layers, n_embd).

    Raises:
        Stopped: `stop` was set; what was read is in the file.
        StorageError, UsageError: the file cannot be written.
    """
    size = 4 * shape[0] * shape[1]
    known = min(path.stat().st_size // size, len(rows)) if path.exists() else 0
    if known < len(rows):
        try:
            with open(path, "ab", opener=_private) as file:
                file.truncate(known * size)
                for done, means in _means(rows, known, locate, reader, stop):
                    file.write(means)
                    file.flush()
                    on_progress(done)
        except OSError as error:
            raise files.write_error(path, error) from None
    found: Floats = np.fromfile(path, np.float32, len(rows) * shape[0] * shape[1]).reshape(len(rows), *shape)
    return found


def _means(
    rows: Sequence[Row], known: int, locate: Callable[[Row], Located], make: Callable[[], Reader], stop: CancelToken
) -> Iterator[tuple[int, bytes]]:
    """How many rows are done, and the means of those that are new."""
    reader = make()
    try:
        for at in range(known, len(rows), _AT_ONCE):
            part = []
            for row in rows[at : at + _AT_ONCE]:
                check_stop(stop)
                part.append(reader.read(*locate(row)).mean(axis=1).tobytes())
            yield at + len(part), b"".join(part)
    finally:
        reader.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, files.PRIVATE)

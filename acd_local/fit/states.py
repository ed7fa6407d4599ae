"""Reads hidden states of many conversations into a file that grows by some means at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from acd_local import files
from acd_local.progress import check_stop
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.reading import Reader
from acd_local.tuning.cache import open_private

Floats = NDArray[np.float32]
Row = TypeVar("Row")
Located = tuple[Sequence[int], int]

# Parts of the depth whose layers are read. Requests differ most in the middle, the last layers know the next word.
DEPTHS = (0.4, 0.45, 0.5, 0.55, 0.6)
_AT_ONCE = 32  # means that are written together


def layers_of(n_layers: int) -> tuple[int, ...]:
    """List the layers that are compared: from 0, in order, never the last one; empty where there is none to read."""
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
    """Read the mean states of all rows, float32, shape (rows, layers, n_embd).

    Args:
        path: holds the means of the first rows, from an earlier call with the same ones.
        locate: a row's tokens, and where those begin whose mean is taken.
        reader: asked for where something is left to read; closed afterwards.
        shape: (layers, n_embd).

    Raises:
        StorageError, UsageError: the file cannot be written.
    """
    size = 4 * shape[0] * shape[1]
    known = min(path.stat().st_size // size, len(rows)) if path.exists() else 0
    if known < len(rows):
        with closing(reader()) as opened:
            try:
                with open_private(path, "ab") as file:
                    file.truncate(known * size)
                    for start in range(known, len(rows), _AT_ONCE):
                        part = []
                        for row in rows[start : start + _AT_ONCE]:
                            check_stop(stop)
                            part.append(opened.read(*locate(row)).mean(axis=1).tobytes())
                        file.write(b"".join(part))
                        file.flush()
                        on_progress(start + len(part))
            except OSError as error:
                raise files.write_error(path, error) from None
    found: Floats = np.fromfile(path, np.float32, len(rows) * shape[0] * shape[1]).reshape(len(rows), *shape)
    return found

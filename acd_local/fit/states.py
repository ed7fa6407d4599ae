"""Reads hidden states of many conversations into a file that grows by some means at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
Located = tuple[Sequence[int], int]  # tokens, and where those begin whose mean is taken
Part = Sequence[Located]
Means = Callable[[Iterable[Part]], Iterator[bytes]]  # as `means_here` gives them

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
    means: Means,
    shape: tuple[int, int],
    *,
    on_progress: Callable[[int], None],
) -> Floats:
    """Read the mean states of all rows, float32, shape (rows, layers, n_embd).

    Args:
        path: holds the means of the first rows, from an earlier call with the same ones.
        means: asked for where something is left to read.
        shape: (layers, n_embd).

    Raises:
        StorageError, UsageError: the file cannot be written.
    """
    size = 4 * shape[0] * shape[1]
    known = min(path.stat().st_size // size, len(rows)) if path.exists() else 0
    if known < len(rows):
        parts = (list(map(locate, rows[at : at + _AT_ONCE])) for at in range(known, len(rows), _AT_ONCE))
        try:
            with open_private(path, "ab") as file:
                file.truncate(known * size)
                for found in means(parts):
                    file.write(found)
                    file.flush()
                    known += len(found) // size
                    on_progress(known)
        except OSError as error:
            raise files.write_error(path, error) from None
    states: Floats = np.fromfile(path, np.float32, len(rows) * shape[0] * shape[1]).reshape(len(rows), *shape)
    return states


def means_here(reader: Callable[[], Reader], stop: CancelToken, parts: Iterable[Part]) -> Iterator[bytes]:
    """Yield for each part its rows' mean states, float32, one behind the other; the reader is closed at the end.

    Raises:
        Stopped: `stop` was set.
    """
    with closing(reader()) as opened:
        for part in parts:
            found = []
            for tokens, start in part:
                check_stop(stop)
                found.append(opened.read(tokens, start).mean(axis=1).tobytes())
            yield b"".join(found)

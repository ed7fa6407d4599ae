"""Gives embedding rows ids, by which a soft prompt travels among tokens, and tells which architectures can read them.

Negative ids in a token sequence stand for rows of a model's table. Every distinct prompt gets ids of its own, so that
comparing sequences of ids compares the rows too: caches, snapshots and prefixes need to know nothing about them.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import PairError

Embeddings = NDArray[np.float32]

# Architectures of llama.cpp whose graphs need the token's id, or take a row for a piece of an image (src/models).
_REFUSED = {
    "gemma3n": "llama.cpp adds embeddings per layer that only a token has",
    "gemma4": "llama.cpp adds embeddings per layer that only a token has",
    "gemma4-assistant": "it is a draft model",
    "qwen4exp": "llama.cpp adds embeddings of token sequences that only tokens have",
    "deepseek4": "llama.cpp chooses experts by the token",
    "graniteswitch": "llama.cpp takes tokens alone",
    "glm4": "llama.cpp takes tokens alone",
    "glm4moe": "llama.cpp takes tokens alone",
    "cogvlm": "llama.cpp reads a row with the weights for images",
}
# Those that multiply token embeddings by sqrt(n_embd), but not rows.
_SCALED = ("gemma3",)


def refusal(architecture: str) -> str | None:
    """Say why rows cannot be used with an architecture (general.architecture); None: they can."""
    return _REFUSED.get(architecture)


class EmbeddingTable:
    """The rows that a model has been given, by id.

    Args:
        width: of the model's token embeddings (llama_model_n_embd).
        input_width: what llama.cpp reads per row (llama_model_n_embd_inp).
        architecture: general.architecture.
    """

    def __init__(self, width: int, input_width: int, architecture: str) -> None:
        self.width = width
        self._reason = refusal(architecture)
        if input_width != width:
            self._reason = f"llama.cpp reads {input_width} numbers per row, not the {width} of a token's embedding"
        self._architecture = architecture
        # As llama.cpp computes it: sqrtf, in float32.
        self._scale = np.float32(math.sqrt(width)) if architecture in _SCALED else None
        self._rows: Embeddings = np.empty((0, width), np.float32)
        self._ids: dict[str, range] = {}
        self._lock = threading.Lock()

    def add(self, rows: Embeddings, digest: str) -> range:
        """Give a prompt's rows ids, shape (n, width); the same for the same `digest`.

        Raises:
            PairError: llama.cpp cannot take them.
        """
        with self._lock:
            if digest not in self._ids:
                self._check(rows)
                first = len(self._rows)
                scaled = rows if self._scale is None else rows * self._scale
                self._rows = np.concatenate([self._rows, scaled.astype(np.float32)])
                self._ids[digest] = range(-first - 1, -len(self._rows) - 1, -1)
            return self._ids[digest]

    def _check(self, rows: Embeddings) -> None:
        if self._reason is not None:
            raise PairError(f"soft prompts do not work with {self._architecture} models: {self._reason}")
        if rows.ndim != 2 or rows.shape[1] != self.width or len(rows) == 0:
            raise PairError(f"soft prompts of shape {rows.shape} do not fit a model that is {self.width} wide")
        if not np.isfinite(rows).all():
            raise PairError("a soft prompt holds a value that is not finite")

    def take(self, ids: Sequence[int] | NDArray[np.int32]) -> Embeddings:
        """Return the rows that negative ids stand for, shape (ids, width), scaled as llama.cpp wants them.

        Raises:
            IndexError: an id is none of this table's.
        """
        index = -1 - np.asarray(ids, np.int64)
        if len(index) and index.min() < 0:
            raise IndexError("a token's id stands among the rows")
        return self._rows[index]

    def portable(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return ids that mean the same in every process: a row's is made of what it holds, a token's stays."""
        found = np.array(ids, np.int64)
        for at in np.flatnonzero(found < 0):
            row = self.take([int(found[at])]).tobytes()
            found[at] = -1 - int.from_bytes(hashlib.sha256(row).digest()[:7], "little")
        return found

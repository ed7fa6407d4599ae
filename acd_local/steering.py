"""Defines steering vectors: what is added to a model's hidden states where a request is to be declined.

Source: safety steering vectors of InferAligner (Wang et al. 2024, arXiv 2401.11206). They belong to one model, as gates
do, and are kept with them (see `vectors`). llama.cpp adds them as control vectors, at every token of a prompt and of
its answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import ModelError, PairError
from acd_local.runtime import llama
from acd_local.softpair import ModelVectors

if TYPE_CHECKING:
    from acd_local.runtime.gguf_header import GGUFInfo

Vectors = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Steering(ModelVectors):
    """What is added to the output of every layer but the first, which llama.cpp's control vectors leave out.

    Attributes:
        added: float32, shape (n_layer - 1, n_embd), a read-only copy of what was given; 0 at layers that are left as
            they are.

    Raises:
        PairError: the shape is another, or a value is not finite.
    """

    added: Vectors

    def __post_init__(self) -> None:
        added = np.array(self.added, dtype=np.float32, order="C")
        if added.shape != (self.n_layer - 1, self.n_embd) or not added.size:
            raise PairError(f"steering vectors of the shape {added.shape}, not {(self.n_layer - 1, self.n_embd)}")
        if not np.isfinite(added).all():
            raise PairError("a steering vector holds a value that is not finite")
        added.setflags(write=False)
        object.__setattr__(self, "added", added)

    @property
    def digest(self) -> str:
        """Hex SHA-256 over the vectors."""
        return hashlib.sha256(self.added.tobytes()).hexdigest()

    def check(self, info: GGUFInfo) -> None:
        """Refuse a model that these vectors do not belong to.

        Raises:
            PairError: they are another model's; one line.
        """
        self.check_model("steering vectors", info)

    def open(self, model: llama.Model, **settings: Any) -> llama.Context:
        """Make a context that adds the vectors, see `runtime.apart.Kind`.

        Raises:
            ModelError: llama.cpp adds none to models of this architecture.
            OutOfMemoryError.
        """
        context = llama.Context(model, **settings)
        try:
            plain = _try(context)
            context.control(np.ones_like(self.added))
            if np.array_equal(plain, _try(context)):
                name = model.metadata("general.architecture")
                raise ModelError(f"llama.cpp applies no control vectors to {name} models: they cannot be steered")
            context.control(self.added)
        except BaseException:
            context.close()
            raise
        return context


def _try(context: llama.Context) -> llama.Logits:
    """Return the logits after some token, in an empty context that is left empty."""
    context.decode([0], [0], [0], [1])
    found: llama.Logits = context.logits(1)[0].copy()
    context.truncate(0, 0)
    return found

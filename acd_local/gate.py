"""Defines gates: logistic probes on a model's own hidden states, which say how likely a request asks for harm.

A gate reads the output of one or two layers in the middle of the model (`runtime.reading`), averaged over the tokens of
the last message and what the template puts behind it, or over tokens of an answer. It belongs to one model, as soft
prompts do, and is kept with them (see `vectors`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import PairError
from acd_local.softpair import ModelVectors

if TYPE_CHECKING:
    from acd_local.runtime.gguf_header import GGUFInfo

MAX_LAYERS = 4
WINDOW = 128  # tokens: of a longer text stretches of this length are looked at too, half of it apart

States = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Probe:
    """A logistic regression on hidden states.

    Attributes:
        weight: float32, shape (layers, n_embd), a read-only copy of what was given.
        bias: of the log odds.

    Raises:
        PairError: not a matrix, more than MAX_LAYERS rows, or a value that is not finite.
    """

    weight: States
    bias: float

    def __post_init__(self) -> None:
        weight = np.array(self.weight, dtype=np.float32, order="C")
        if weight.ndim != 2 or not 1 <= weight.shape[0] <= MAX_LAYERS or weight.shape[1] < 1:
            raise PairError(f"a probe has 1 to {MAX_LAYERS} rows of n_embd numbers, not the shape {weight.shape}")
        if not (np.isfinite(weight).all() and np.isfinite(self.bias)):
            raise PairError("a probe holds a value that is not finite")
        weight.setflags(write=False)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "bias", float(self.bias))

    def probability(self, states: States) -> float:
        """Return the chance of harm.

        Args:
            states: means over tokens, shape (layers, n_embd).
        """
        odds = float(np.vdot(self.weight, states)) + self.bias
        return float(1 / (1 + np.exp(-np.clip(odds, -60, 60))))

    def highest(self, states: States) -> float:
        """Return the chance of harm of a text: of all of it, or of the stretch of WINDOW tokens that is worst.

        Args:
            states: of its tokens, shape (layers, n, n_embd), n >= 1.
        """
        n = states.shape[1]
        starts = [*range(0, n - WINDOW, WINDOW // 2), n - WINDOW] if n > WINDOW else []
        parts = [states, *(states[:, start : start + WINDOW] for start in starts)]
        return max(self.probability(part.mean(axis=1)) for part in parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Probe) and self.bias == other.bias and np.array_equal(self.weight, other.weight)

    def __hash__(self) -> int:
        return hash((self.bias, self.weight.tobytes()))


@dataclass(frozen=True)
class Gate(ModelVectors):
    """Two probes of a model's hidden states.

    Attributes:
        layers: whose output both probes read, from 0.
        request: reads the last message. answer: reads the latest tokens of an answer; None: answers are not read.

    Raises:
        PairError: the widths do not agree, or a layer is none of the model's.
    """

    layers: tuple[int, ...]
    request: Probe
    answer: Probe | None

    def __post_init__(self) -> None:
        for key, probe in (("request", self.request), ("answer", self.answer)):
            if probe is not None and probe.weight.shape != (len(self.layers), self.n_embd):
                raise PairError(
                    f"{key}: the probe has the shape {probe.weight.shape}, for {len(self.layers)} layers of n_embd "
                    f"{self.n_embd}"
                )
        if sorted({*self.layers}) != list(self.layers) or not 0 <= self.layers[0] <= self.layers[-1] < self.n_layer - 1:
            raise PairError(f"the layers {self.layers} cannot be read: the model has {self.n_layer}")

    def check(self, info: GGUFInfo) -> None:
        """Refuse a model that this gate does not read.

        Raises:
            PairError: it is another model's; one line.
        """
        self.check_model("gate", info)


def probe_of(weight: Any, bias: Any) -> Probe:
    """Make a probe of a file's tensors, of the shapes (n, n_embd) and (1,)."""
    if np.shape(bias) != (1,):
        raise PairError(f"the bias of a probe is one number, not of the shape {np.shape(bias)}")
    return Probe(weight, float(bias[0]))

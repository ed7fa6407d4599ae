"""What tests of gated answers share: options, and pairs whose gates say the same of everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gates
import tiny_gguf
from gates import HARMFUL, HARMLESS

from acd_local import Options
from acd_local.answers import Answer
from acd_local.pairs import GateSettings, PromptPair
from acd_local.runtime.prompts import PromptSetup

GREEDY = Options(temp=0.0, max_tokens=12)
SEEDED = Options(temp=0.9, seed=11, max_tokens=12)
PLAIN = {"alpha": 0.0, "beta": 0.0}  # the model's own distribution
AS_IS = PromptSetup()
LOOKING = GateSettings(0.5, look=4, answer_threshold=0.9)
WRITERS = ("llama", "qwen2vl", "phi3", "gemma2", "gemma3", "mamba", "lfm2", "granite_hybrid")


def tokens(answer: Answer) -> list[int]:
    return [record.token for record in answer.tokens]


def four_layers(tiny: Callable[..., Path], name: str = "llama") -> Path:
    more = {} if name.startswith("gemma") else {"n_layers": 4}
    return tiny("chatml", writer=getattr(tiny_gguf, f"write_{name}"), **more)


def constant(
    folder: Path, model: Path, value: float, settings: GateSettings, answer: float | None = None
) -> PromptPair:
    """A pair whose gate says `value` of every request, and `answer` of every answer."""
    gate = gates.between(model, HARMFUL, HARMLESS, answer=None if answer is None else gates.always(model, answer))
    gate = replace(gate, request=gates.always(model, value))
    return gates.write_pair(folder, model, settings=settings, gate=gate, name=f"says-{value}-{answer}")


def turning(folder: Path, model: Path, **settings: Any) -> PromptPair:
    """A pair whose answers turn at the first look, after 4 tokens."""
    return constant(folder, model, 0.1, replace(LOOKING, **settings), 0.95)

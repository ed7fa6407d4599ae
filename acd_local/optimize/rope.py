"""Rotary positions that transformers leaves out when it reads a GGUF file: brought along, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from acd_local.errors import ModelError, shown
from acd_local.runtime import gguf_header

FACTORS = "rope_freqs.weight"  # Llama 3.1 and 3.2: what each frequency is divided by (llama.cpp: freq_factors)


def check(path: Path, architecture: str) -> None:
    """Raises ModelError where torch would turn positions otherwise than llama.cpp does."""
    scaling = gguf_header.text_value(path, f"{architecture}.rope.scaling.type")
    names = gguf_header.tensor_shapes(path)
    if scaling not in ("", "none") or any(name.startswith("rope_factors_") for name in names):
        raise ModelError(
            f"{path.name}: acd optimize cannot train models with scaled rotary positions "
            f"({shown(scaling or 'long rope')}): transformers leaves the scaling of a GGUF file out"
        )


def bring_along(model: Any, path: Path) -> None:
    """Divide the frequencies of a transformers model by the file's factors, if it has any.

    Raises:
        ModelError: this model keeps its frequencies elsewhere.
    """
    if FACTORS not in gguf_header.tensor_shapes(path):
        return
    import torch
    from gguf import GGUFReader

    rotary = getattr(model.model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    data = next(tensor.data for tensor in GGUFReader(path).tensors if tensor.name == FACTORS)
    factors = torch.tensor(data, dtype=torch.float32)
    if getattr(rotary, "rope_type", "") != "default" or frequencies is None or frequencies.shape != factors.shape:
        raise ModelError(f"{path.name}: acd optimize cannot give this model the file's {FACTORS} in torch")
    frequencies.div_(factors)

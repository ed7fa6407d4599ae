"""The torch model is the GGUF file's, as llama.cpp runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from optimizing import torch
from reference import fresh_logits

from acd_local.errors import ModelError
from acd_local.optimize import weights
from acd_local.optimize.weights import FrozenModel
from acd_local.runtime import llama

TORCH_TOLERANCE = 0.03  # llama.cpp's KV cache is f16


@pytest.mark.parametrize("rope_freqs", [False, True])
def test_its_logits_are_llama_cpps(tiny: Callable[..., Path], rope_freqs: bool) -> None:
    """With the factors that Llama 3.1 divides its rotary frequencies by, where positions are large enough to tell."""
    path = tiny("chatml", rope_freqs=rope_freqs)
    tokens = np.random.default_rng(1).integers(5, 300, 200).tolist()
    model = FrozenModel(path)
    with torch.no_grad():
        found = model.logits(model.prefix(model.embed(tokens).float()).hidden[-1:])[0].numpy()
    with llama.Model(path) as file:
        wanted = fresh_logits(file, tokens)
    assert np.abs(found - wanted).max() < TORCH_TOLERANCE
    assert wanted.std() > 1


def test_the_factors_matter(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("chatml", rope_freqs=True)
    tokens = np.random.default_rng(1).integers(5, 300, 200).tolist()
    monkeypatch.setattr(weights, "bring_rope_factors", lambda model, path: None)
    model = FrozenModel(path)
    with torch.no_grad():
        found = model.logits(model.prefix(model.embed(tokens).float()).hidden[-1:])[0].numpy()
    with llama.Model(path) as file:
        assert np.abs(found - fresh_logits(file, tokens)).max() > 3 * TORCH_TOLERANCE


def test_torch_is_compared_with_llama_cpp(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """KL(llama.cpp || torch) by hand; where the file's positions are turned otherwise it is told."""
    path = tiny("chatml", rope_freqs=True)
    tokens = np.random.default_rng(1).integers(5, 300, 200).tolist()
    model = FrozenModel(path)
    with llama.Model(path) as file:
        near = weights.divergence(model, file, tokens, threads=1)
        assert 0 < near < 0.001
        weights.check_divergence(near, path.name)

        monkeypatch.setattr(weights, "bring_rope_factors", lambda model, path: None)
        other = FrozenModel(path)
        far = weights.divergence(other, file, tokens, threads=1)
        wanted = [torch.from_numpy(fresh_logits(file, tokens[: n + 1])).log_softmax(0) for n in range(199)]
    with torch.no_grad():
        mine = other.logits(other.prefix(other.embed(tokens).float()).hidden).log_softmax(1)
    kl = [float((a.exp() * (a - b)).sum()) for a, b in zip(wanted, mine, strict=False)]
    assert far == pytest.approx(np.mean(kl), rel=1e-3)
    assert far > 10 * near


@pytest.mark.parametrize("found", [weights.MAX_DIVERGENCE * 1.01, float("nan")])
def test_a_file_that_transformers_reads_otherwise_is_one_line(found: float) -> None:
    weights.check_divergence(weights.MAX_DIVERGENCE, "model.gguf")
    with pytest.raises(ModelError, match=r"^model\.gguf: .* does not read its file as llama\.cpp") as caught:
        weights.check_divergence(found, "model.gguf")
    assert "\n" not in str(caught.value)


def test_factors_that_have_no_place_are_refused(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml", rope_freqs=True)
    model = FrozenModel(path).model
    model.model.rotary_emb.rope_type = "llama3"  # as if transformers had read them itself
    with pytest.raises(ModelError, match=r"cannot give this model the file's rope_freqs\.weight"):
        weights.bring_rope_factors(model, path)

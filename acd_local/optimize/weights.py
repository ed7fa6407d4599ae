"""Loads a GGUF file's weights as a frozen torch model, checks it against llama.cpp, and runs what all losses share.

Sequences of a batch begin alike: template, soft prompt, template up to the user's words. That prefix is computed once
and its keys and values are shared by all sequences, whose own tokens follow. Gradients reach the prefix through them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from acd_local.errors import ModelError, OutOfMemoryError, shown
from acd_local.evaluate.likelihood import Scorer
from acd_local.optimize.losses import Targets
from acd_local.runtime import embeddings, gguf_header, llama
from acd_local.runtime.gguf_header import GGUFInfo

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and 3.2: what each frequency is divided by (llama.cpp: freq_factors)
# Nats. The demo model is at 0.003 in float32 and at 0.005 in bfloat16, and at 0.6 with all rotary frequencies halved.
MAX_DIVERGENCE = 0.1
# transformers reads these from GGUF files, but as models of another build than weights.FrozenModel can share keys of.
_OTHER_BUILD = ("bloom", "falcon", "gpt2", "lfm2", "mamba", "t5", "umt5")


@dataclass(frozen=True)
class Example:
    """One conversation behind the shared prefix.

    Attributes:
        prompt: token ids from the prefix to where the answer starts.
        answer: token ids of the answer, at least one.
        under: name of the manual prompt that the answer was sampled under; empty where it was written.
        targets: what the answer's tokens were drawn from, where that is known.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    under: str = ""
    targets: Targets | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class FrozenModel:
    """A causal language model whose weights do not change; only what is put into it is optimized.

    Args:
        path: GGUF file; its weights are dequantized.
        device: torch's name of the device.
        dtype: of weights and activations; losses are computed in float32.

    Raises:
        ModelError: transformers cannot turn this file into a torch model that is llama.cpp's.
    """

    def __init__(self, path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        loaded = _load(path, dtype)
        bring_rope_factors(loaded, path)
        self.model = loaded.to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.dtype = dtype
        self.embeddings: torch.Tensor = self.model.get_input_embeddings().weight
        self._scale = self._embedding_scale()
        self._cap: float | None = getattr(self.model.config, "final_logit_softcapping", None)

    @property
    def width(self) -> int:
        """Length of an embedding row, n_embd."""
        return int(self.embeddings.shape[1])

    def embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return the embedding rows, shape (len(tokens), n_embd)."""
        return self.embeddings[torch.tensor(tokens, dtype=torch.long, device=self.device)]

    def prefix(self, rows: torch.Tensor) -> Prefix:
        """Compute keys and values of a sequence's beginning, given as embedding rows of shape (n, n_embd)."""
        out = self.model.model(inputs_embeds=(rows * self._scale).to(self.dtype)[None], use_cache=True)
        return Prefix([(layer.keys, layer.values) for layer in out.past_key_values.layers], out.last_hidden_state[0])

    def _embedding_scale(self) -> float:
        """Return what the model multiplies rows of the table on their way in: Gemma 3 by sqrt(n_embd), most by 1.

        transformers does so for tokens, not for rows that come as inputs_embeds. A prompt's rows are kept unscaled.
        """
        token = int(self.embeddings[:1000].float().norm(dim=1).argmax())
        with torch.no_grad():
            seen = self.model.get_input_embeddings()(torch.tensor([token], device=self.device))[0]
        return float(seen.float().norm() / self.embeddings[token].float().norm())

    def answer_logits(self, prefix: Prefix, examples: Sequence[Example]) -> torch.Tensor:
        """Compute the logits at the positions that predict the answers' tokens.

        Returns:
            Shape (answer tokens of all examples, n_vocab), float32, example after example.
        """
        hidden = self.hidden(prefix, [[*e.prompt, *e.answer] for e in examples])
        at = [(i, len(e.prompt) - 1 + t) for i, e in enumerate(examples) for t in range(len(e.answer))]
        rows, columns = (torch.tensor(index, device=self.device) for index in zip(*at, strict=True))
        return self.logits(hidden[rows, columns])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute next-token logits, shape (n, n_vocab), float32, from last hidden states of shape (n, n_embd)."""
        logits: torch.Tensor = self.model.lm_head(hidden).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)  # Gemma 2

    def hidden(self, prefix: Prefix, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute the last hidden states after the prefix, right-padded, shape (len(sequences), longest, n_embd)."""
        longest = max(map(len, sequences))
        # Padding follows the tokens, and attention is causal: it needs no mask.
        ids = torch.zeros(len(sequences), longest, dtype=torch.long, device=self.device)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence, device=self.device)
        start = prefix.length
        positions = torch.arange(start, start + longest, device=self.device)[None]
        out = self.model.model(
            input_ids=ids, past_key_values=prefix.repeated(len(sequences)), position_ids=positions, use_cache=True
        )
        hidden: torch.Tensor = out.last_hidden_state
        return hidden


class Prefix:
    """A beginning: keys and values per layer, each of shape (1, n_head_kv, n, head_dim), and last hidden states."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], hidden: torch.Tensor) -> None:
        self._layers = layers
        self.hidden = hidden
        self.length = int(layers[0][0].shape[-2])

    def leaf(self) -> Prefix:
        """Copy the values, cut off from what they were computed from, to gather gradients at."""
        return Prefix(
            [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in self._layers], self.hidden
        )

    def backward(self, leaf: Prefix) -> None:
        """Hand the gradients gathered at `leaf` on to what this prefix was computed from."""
        mine = [t for layer in self._layers for t in layer]
        gathered = [t.grad for layer in leaf._layers for t in layer]
        torch.autograd.backward(mine, gathered)

    def repeated(self, count: int) -> Any:
        """Make a cache that holds the prefix for each of `count` sequences."""
        from transformers import DynamicCache

        expanded = [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in self._layers]
        return DynamicCache(expanded)


def _load(path: Path, dtype: torch.dtype) -> Any:
    with quiet():
        from transformers import AutoModelForCausalLM

        try:
            return AutoModelForCausalLM.from_pretrained(
                str(path.parent), gguf_file=path.name, dtype=dtype, attn_implementation="eager"
            )
        except (ValueError, NotImplementedError, KeyError, OSError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{path.name}: transformers cannot load this file into torch: {reason}") from None
        except MemoryError:
            raise OutOfMemoryError(f"{path.name}: not enough memory for the weights in torch") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, which reports to stderr with bars and advice that mean nothing here."""
    from transformers.utils import logging as transformers_logging

    gguf_reader: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    bar = gguf_reader.tqdm  # of the tensors; no setting of transformers turns it off
    gguf_reader.tqdm = partial(bar, disable=True)
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gguf_reader.tqdm = bar
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


# --- Whether torch has what llama.cpp has -----------------------------------------------------------------------------


def check_file(info: GGUFInfo) -> None:
    """Raise ModelError where torch would not have what llama.cpp does, or llama.cpp takes no rows for this kind."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    def bare(name: str) -> str:
        return name.replace("-", "").replace("_", "")

    name = info.path.name
    if len(info.parts) > 1:
        raise ModelError(f"{name}: acd optimize needs one file: join the parts with llama-gguf-split --merge")
    known = {bare(a) for a in GGUF_SUPPORTED_ARCHITECTURES} - set(_OTHER_BUILD) - {"general", "tokenizer"}
    if bare(info.architecture) not in known:
        raise ModelError(
            f"{name}: acd optimize cannot train {shown(info.architecture)} models; it can train "
            f"{', '.join(sorted(known))}"
        )
    scaling = gguf_header.text_value(info.path, f"{info.architecture}.rope.scaling.type")
    tensors = gguf_header.tensor_shapes(info.path)
    if scaling not in ("", "none") or any(tensor.startswith("rope_factors_") for tensor in tensors):
        raise ModelError(
            f"{name}: acd optimize cannot train models with scaled rotary positions "
            f"({shown(scaling or 'long rope')}): transformers leaves the scaling of a GGUF file out"
        )
    if reason := embeddings.refusal(info.architecture):
        raise ModelError(f"{name}: soft prompts do not work with {info.architecture} models: {reason}")


def bring_rope_factors(model: Any, path: Path) -> None:
    """Divide the frequencies of a transformers model by the file's factors, if it has any.

    Raises:
        ModelError: this model keeps its frequencies elsewhere.
    """
    if ROPE_FACTORS not in gguf_header.tensor_shapes(path):
        return
    from gguf import GGUFReader

    rotary = getattr(model.model, "rotary_emb", None)
    frequencies = getattr(rotary, "inv_freq", None)
    data = next(tensor.data for tensor in GGUFReader(path).tensors if tensor.name == ROPE_FACTORS)
    factors = torch.tensor(data, dtype=torch.float32)
    if getattr(rotary, "rope_type", "") != "default" or frequencies is None or frequencies.shape != factors.shape:
        raise ModelError(f"{path.name}: acd optimize cannot give this model the file's {ROPE_FACTORS} in torch")
    frequencies.div_(factors)


def divergence(model: FrozenModel, file: llama.Model, tokens: Sequence[int], *, threads: int) -> float:
    """Average, over the positions of `tokens`, KL(llama.cpp || torch) between next-token distributions, nats.

    Raises:
        OutOfMemoryError.
    """
    with Scorer(file, n_streams=1, n_ctx=len(tokens) + 1, threads=threads) as scorer:
        pieces = [logits[0].copy() for _, logits in scorer.logits([tokens[:1]], tokens[1:])]
    with torch.no_grad():
        mine = model.logits(model.prefix(model.embed(tokens[:-1]).float()).hidden).log_softmax(1).cpu()
    wanted = torch.from_numpy(np.concatenate(pieces)).log_softmax(1)
    return float((wanted.exp() * (wanted - mine)).sum(1).mean())


def check_divergence(found: float, name: str) -> None:
    """Raise ModelError where a divergence is more than arithmetic explains, or is no number."""
    if not found <= MAX_DIVERGENCE:
        raise ModelError(
            f"{name}: acd optimize cannot train this model: transformers does not read its file as llama.cpp does "
            f"(their distributions differ by {found:.2g} nats a token)"
        )

"""A GGUF file's weights as a frozen torch model, and the forward pass that all losses share.

Sequences of a batch begin alike: template, soft prompt, template up to the user's words. That prefix is computed once
and its keys and values are shared by all sequences, whose own tokens follow. Gradients reach the prefix through them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from acd_local.errors import ModelError, OutOfMemoryError
from acd_local.optimize import rope
from acd_local.optimize.losses import Targets

if TYPE_CHECKING:
    from collections.abc import Iterator

Device = str


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

    def __init__(self, path: Path, *, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        loaded = _load(path, dtype)
        rope.bring_along(loaded, path)
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
        """Embedding rows, shape (len(tokens), n_embd)."""
        return self.embeddings[torch.tensor(tokens, dtype=torch.long, device=self.device)]

    def prefix(self, rows: torch.Tensor) -> Prefix:
        """Keys and values of a sequence's beginning, given as embedding rows of shape (n, n_embd)."""
        out = self.model.model(inputs_embeds=(rows * self._scale).to(self.dtype)[None], use_cache=True)
        return Prefix([(layer.keys, layer.values) for layer in out.past_key_values.layers], out.last_hidden_state[0])

    def _embedding_scale(self) -> float:
        """By what the model multiplies rows of the table on their way in: Gemma 3 by sqrt(n_embd), most by 1.

        transformers does so for tokens, not for rows that come as inputs_embeds. A prompt's rows are kept unscaled.
        """
        token = int(self.embeddings[:1000].float().norm(dim=1).argmax())
        with torch.no_grad():
            seen = self.model.get_input_embeddings()(torch.tensor([token], device=self.device))[0]
        return float(seen.float().norm() / self.embeddings[token].float().norm())

    def answer_logits(self, prefix: Prefix, examples: Sequence[Example]) -> torch.Tensor:
        """Logits at the positions that predict the answers' tokens.

        Returns:
            Shape (answer tokens of all examples, n_vocab), float32, example after example.
        """
        hidden = self.hidden(prefix, [[*e.prompt, *e.answer] for e in examples])
        at = [(i, len(e.prompt) - 1 + t) for i, e in enumerate(examples) for t in range(len(e.answer))]
        rows, columns = (torch.tensor(index, device=self.device) for index in zip(*at, strict=True))
        return self.logits(hidden[rows, columns])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits, shape (n, n_vocab), float32, from last hidden states of shape (n, n_embd)."""
        logits: torch.Tensor = self.model.lm_head(hidden).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)  # Gemma 2

    def hidden(self, prefix: Prefix, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Last hidden states after the prefix, right-padded, shape (len(sequences), longest, n_embd)."""
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
        """The same values, cut off from what they were computed from, to gather gradients at."""
        return Prefix(
            [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in self._layers], self.hidden
        )

    def backward(self, leaf: Prefix) -> None:
        """Hand the gradients gathered at `leaf` on to what this prefix was computed from."""
        mine = [t for layer in self._layers for t in layer]
        gathered = [t.grad for layer in leaf._layers for t in layer]
        torch.autograd.backward(mine, gathered)

    def repeated(self, count: int) -> Any:
        """A cache that holds the prefix for each of `count` sequences."""
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
    """transformers reports to stderr by itself, with bars and advice that mean nothing here."""
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

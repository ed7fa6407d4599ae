"""Writes tiny random GGUF models (under 2 MB, in milliseconds) that llama.cpp really loads and decodes.

Every writer is deterministic in `seed` and returns the path. The weights are scaled so that the next-token distribution
has some spread (largest probability roughly 0.05 to 0.5) and greedy comparisons rarely meet near-ties. The vocabularies
are small but complete: byte-level BPE ("gpt2") and SentencePiece ("llama"), any text can be encoded.

    write_llama        full attention
    write_qwen2vl      full attention, rope by four positions (M-RoPE)
    write_phi3         full attention with long and short rope factors
    write_gemma2 / 3   sliding-window and full layers in turn
    write_mamba        recurrent
    write_lfm2         hybrid (short convolution + attention; llama.cpp can roll its state back)
    write_granite_hybrid   hybrid (Mamba-2 + attention; llama.cpp cannot roll its state back)
    write_family       any of these with the vocabulary and chat template of a known family (FAMILIES)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant
from tiny_families import FAMILIES
from tiny_vocab import ENGLISH, ExtraTokens, make_vocab


class _Writer:
    """A GGUFWriter with the tokenizer filled in, and seeded random tensors."""

    def __init__(
        self,
        path: Path | str,
        arch: str,
        *,
        seed: int,
        ftype: str = "F32",
        name: str | None = None,
        vocab: str = "bpe",
        pre: str = "smollm",
        n_vocab: int | None = None,
        extra_tokens: ExtraTokens = (),
        specials: Sequence[str] = ("<unk>", "<s>", "</s>"),
        bos: str | None = None,
        eos: str | None = None,
        eot: str | None = None,
        add_bos: bool | None = None,
        add_space_prefix: bool | None = None,
        chat_template: str | None = None,
        words: Sequence[str] = ENGLISH,
    ) -> None:
        self.path = Path(path)
        self.arch = arch
        self.quant = Quant[ftype]
        self.rng = np.random.default_rng(seed)
        self.w = w = gguf.GGUFWriter(self.path, arch)
        w.add_name(name or f"tiny {arch}")
        w.add_file_type(int(gguf.LlamaFileType[f"ALL_{ftype}" if ftype == "F32" else f"MOSTLY_{ftype}"]))
        v = self.vocab = make_vocab(
            vocab, pre=pre, extra_tokens=extra_tokens, specials=specials, n_vocab=n_vocab, words=words
        )
        self.n_vocab = len(v.tokens)
        w.add_tokenizer_model(v.model)
        w.add_tokenizer_pre(v.pre)
        w.add_token_list(v.tokens)
        w.add_token_types(v.types)
        if v.model == "llama":
            w.add_token_scores(v.scores)
        else:
            w.add_token_merges(v.merges)
        if "<unk>" in v.tokens:
            w.add_unk_token_id(v.index("<unk>"))
        if bos is not None:
            w.add_bos_token_id(v.index(bos))
        if eos is not None:
            w.add_eos_token_id(v.index(eos))
        if eot is not None:
            w.add_eot_token_id(v.index(eot))
        if add_bos is not None:
            w.add_add_bos_token(add_bos)
        if add_space_prefix is not None:
            w.add_add_space_prefix(add_space_prefix)
        if chat_template is not None:
            w.add_chat_template(chat_template)

    def random(self, name: str, *shape: int, std: float) -> None:
        """A matrix; `shape` in numpy order, rows first (the last one is llama.cpp's ne[0])."""
        data = self.rng.normal(0.0, std, shape).astype(np.float32)
        if len(shape) < 2 or self.quant == Quant.F32 or shape[-1] % 32:
            self.w.add_tensor(name, data)
        elif self.quant == Quant.F16:
            self.w.add_tensor(name, data.astype(np.float16))
        else:
            self.w.add_tensor(name, gguf.quants.quantize(data, self.quant), raw_dtype=self.quant)

    def exact(self, name: str, data: Any) -> None:
        """A tensor kept in F32."""
        self.w.add_tensor(name, np.asarray(data, dtype=np.float32))

    def norm(self, name: str, n: int, scale: float = 1.0) -> None:
        self.exact(name, scale * self.rng.uniform(0.7, 1.3, n))

    def embeddings(self, n_embd: int, *, tied: bool = False, output_norm: str = "output_norm.weight") -> None:
        self.random("token_embd.weight", self.n_vocab, n_embd, std=0.3 if tied else 1.0)
        self.norm(output_norm, n_embd)
        if not tied:
            self.random("output.weight", self.n_vocab, n_embd, std=0.3 * (64 / n_embd) ** 0.5)

    def attention(self, i: int, n_embd: int, n_head: int, n_head_kv: int, head_dim: int) -> None:
        std = n_embd**-0.5
        self.random(f"blk.{i}.attn_q.weight", n_head * head_dim, n_embd, std=2 * std)
        self.random(f"blk.{i}.attn_k.weight", n_head_kv * head_dim, n_embd, std=std)
        self.random(f"blk.{i}.attn_v.weight", n_head_kv * head_dim, n_embd, std=2 * std)
        self.random(f"blk.{i}.attn_output.weight", n_embd, n_head * head_dim, std=2 * (n_head * head_dim) ** -0.5)

    def feed_forward(self, i: int, n_embd: int, n_ff: int) -> None:
        self.norm(f"blk.{i}.ffn_norm.weight", n_embd)
        self.random(f"blk.{i}.ffn_gate.weight", n_ff, n_embd, std=2 * n_embd**-0.5)
        self.random(f"blk.{i}.ffn_up.weight", n_ff, n_embd, std=n_embd**-0.5)
        self.random(f"blk.{i}.ffn_down.weight", n_embd, n_ff, std=2 * n_ff**-0.5)

    def close(self) -> Path:
        self.w.write_header_to_file()
        self.w.write_kv_data_to_file()
        self.w.write_tensors_to_file()
        self.w.close()
        return self.path


def write_llama(
    path: Path | str,
    *,
    seed: int = 0,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layers: int = 2,
    n_ff: int = 128,
    n_ctx: int = 2048,
    head_dim: int | None = None,
    arch: str = "llama",
    rope_sections: list[int] | None = None,
    rope_freqs: bool = False,
    rope_scaling: str | None = None,
    **common: Any,
) -> Path:
    """A llama model. `common`: keyword arguments of `_Writer` (vocab, n_vocab, extra_tokens, chat_template, ...)."""
    out = _Writer(path, arch, seed=seed, **common)
    if rope_sections is not None:
        out.w.add_rope_dimension_sections(rope_sections)
    dim = head_dim or n_embd // n_head
    _transformer_keys(out, n_ctx, n_embd, n_layers, n_ff, n_head, n_head_kv)
    out.w.add_rope_dimension_count(dim)
    out.w.add_rope_freq_base(10000.0)
    if rope_scaling is not None:
        out.w.add_string(f"{arch}.rope.scaling.type", rope_scaling)
        out.w.add_rope_scaling_factor(4.0)
    if rope_freqs:  # as Llama 3.1 has them
        out.exact("rope_freqs.weight", np.linspace(1.0, 8.0, dim // 2))
    if head_dim is not None:
        out.w.add_key_length(dim)
        out.w.add_value_length(dim)
    out.embeddings(n_embd)
    for i in range(n_layers):
        out.norm(f"blk.{i}.attn_norm.weight", n_embd)
        out.attention(i, n_embd, n_head, n_head_kv, dim)
        out.feed_forward(i, n_embd, n_ff)
    return out.close()


def write_sample(path: Path | str) -> Path:
    """The tiny model that the package ships (acd_local/runtime/sample.gguf): one layer of Q4_0, one of Q8_0.

    `PYTHONPATH=tests/helpers python -c "import tiny_gguf as t; t.write_sample('acd_local/runtime/sample.gguf')"`
    """
    n_embd, n_head, n_ff = 64, 2, 64  # rows in multiples of 32, which llama.cpp's AMX and repacked kernels take
    out = _Writer(path, "llama", seed=0, ftype="Q8_0", name="acd_local sample", n_vocab=288, words=("\n\n",))
    _transformer_keys(out, 256, n_embd, 2, n_ff, n_head, n_head)
    out.w.add_rope_dimension_count(n_embd // n_head)
    out.embeddings(n_embd, tied=True)
    for i, quant in enumerate((Quant.Q4_0, Quant.Q8_0)):
        out.quant = quant
        out.norm(f"blk.{i}.attn_norm.weight", n_embd)
        out.attention(i, n_embd, n_head, n_head, n_embd // n_head)
        out.feed_forward(i, n_embd, n_ff)
    return out.close()


def write_qwen2vl(path: Path | str, *, head_dim: int = 16, **kw: Any) -> Path:
    """A qwen2vl model, as `write_llama` but for its rope, which turns by four positions (M-RoPE)."""
    quarter = head_dim // 8
    return write_llama(path, arch="qwen2vl", head_dim=head_dim, rope_sections=[2 * quarter, quarter, quarter, 0], **kw)


def write_phi3(
    path: Path | str,
    *,
    seed: int = 0,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layers: int = 2,
    n_ff: int = 128,
    n_ctx: int = 4096,
    n_ctx_orig: int = 512,
    **common: Any,
) -> Path:
    """A phi3 model whose rope factors switch from short to long once a context is larger than `n_ctx_orig`."""
    # llama.cpp looks for "</s>" in the vocabulary of anything whose name says phi3, and fails without it.
    common["name"] = common.get("name") or "tiny long rope"
    out = _Writer(path, "phi3", seed=seed, **common)
    dim = n_embd // n_head
    _transformer_keys(out, n_ctx, n_embd, n_layers, n_ff, n_head, n_head_kv)
    out.w.add_rope_dimension_count(dim)
    out.w.add_rope_scaling_orig_ctx_len(n_ctx_orig)
    out.w.add_rope_scaling_attn_factors(1.19)
    out.embeddings(n_embd)
    out.exact("rope_factors_long.weight", np.linspace(1.0, 8.0, dim // 2))
    out.exact("rope_factors_short.weight", np.linspace(1.0, 1.2, dim // 2))
    for i in range(n_layers):
        out.norm(f"blk.{i}.attn_norm.weight", n_embd)
        out.random(f"blk.{i}.attn_qkv.weight", n_embd + 2 * n_head_kv * dim, n_embd, std=2 * n_embd**-0.5)
        out.random(f"blk.{i}.attn_output.weight", n_embd, n_embd, std=2 * n_embd**-0.5)
        out.norm(f"blk.{i}.ffn_norm.weight", n_embd)
        out.random(f"blk.{i}.ffn_up.weight", 2 * n_ff, n_embd, std=1.5 * n_embd**-0.5)
        out.random(f"blk.{i}.ffn_down.weight", n_embd, n_ff, std=2 * n_ff**-0.5)
    return out.close()


def write_gemma2(path: Path | str, **kw: Any) -> Path:
    """A gemma2 model: layers 0, 2, ... see the last `window` tokens, layers 1, 3, ... see all. Tied embeddings."""
    return _write_gemma(path, "gemma2", **kw)


def write_gemma3(path: Path | str, **kw: Any) -> Path:
    """A gemma3 model: as `write_gemma2`, with query and key norms and an output matrix of its own."""
    return _write_gemma(path, "gemma3", **kw)


def _write_gemma(
    path: Path | str,
    arch: str,
    *,
    seed: int = 0,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layers: int = 4,
    n_ff: int = 128,
    n_ctx: int = 2048,
    head_dim: int = 16,
    window: int = 16,
    **common: Any,
) -> Path:
    out = _Writer(path, arch, seed=seed, **common)
    _transformer_keys(out, n_ctx, n_embd, n_layers, n_ff, n_head, n_head_kv)
    out.w.add_key_length(head_dim)
    out.w.add_value_length(head_dim)
    out.w.add_sliding_window(window)
    out.w.add_sliding_window_pattern(2)
    if arch == "gemma2":
        out.w.add_attn_logit_softcapping(50.0)
        out.w.add_final_logit_softcapping(30.0)
    out.embeddings(n_embd, tied=arch == "gemma2")
    for i in range(n_layers):
        out.norm(f"blk.{i}.attn_norm.weight", n_embd)
        out.attention(i, n_embd, n_head, n_head_kv, head_dim)
        if arch == "gemma3":
            out.norm(f"blk.{i}.attn_q_norm.weight", head_dim, 2.0)
            out.norm(f"blk.{i}.attn_k_norm.weight", head_dim)
        # The embedding enters scaled by sqrt(n_embd): the layers must weigh as much.
        out.norm(f"blk.{i}.post_attention_norm.weight", n_embd, 6.0)
        out.feed_forward(i, n_embd, n_ff)
        out.norm(f"blk.{i}.post_ffw_norm.weight", n_embd, 6.0)
    return out.close()


def write_mamba(
    path: Path | str,
    *,
    seed: int = 0,
    n_embd: int = 64,
    n_layers: int = 2,
    n_ctx: int = 2048,
    d_state: int = 16,
    d_conv: int = 4,
    dt_rank: int = 4,
    **common: Any,
) -> Path:
    """A Mamba model: recurrent state only, no attention and no KV cells."""
    out = _Writer(path, "mamba", seed=seed, **common)
    d_inner = 2 * n_embd
    _transformer_keys(out, n_ctx, n_embd, n_layers, 0, 0, None)
    _ssm_keys(out, d_conv, d_inner, d_state, dt_rank)
    out.embeddings(n_embd)
    for i in range(n_layers):
        out.norm(f"blk.{i}.attn_norm.weight", n_embd)
        out.random(f"blk.{i}.ssm_in.weight", 2 * d_inner, n_embd, std=2 * n_embd**-0.5)
        out.exact(f"blk.{i}.ssm_conv1d.weight", out.rng.normal(0, 0.5, (d_inner, d_conv)))
        out.exact(f"blk.{i}.ssm_conv1d.bias", out.rng.normal(0, 0.1, d_inner))
        out.random(f"blk.{i}.ssm_x.weight", dt_rank + 2 * d_state, d_inner, std=2 * d_inner**-0.5)
        out.random(f"blk.{i}.ssm_dt.weight", d_inner, dt_rank, std=0.5)
        out.exact(f"blk.{i}.ssm_dt.bias", out.rng.uniform(-3, -1, d_inner))
        out.exact(f"blk.{i}.ssm_a", -np.tile(np.arange(1, d_state + 1), (d_inner, 1)))
        out.exact(f"blk.{i}.ssm_d", np.ones(d_inner))
        out.random(f"blk.{i}.ssm_out.weight", n_embd, d_inner, std=3 * d_inner**-0.5)
    return out.close()


def write_lfm2(
    path: Path | str,
    *,
    seed: int = 0,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layers: int = 2,
    n_ff: int = 128,
    n_ctx: int = 2048,
    **common: Any,
) -> Path:
    """An LFM2 model: short convolutions in the even layers, attention in the odd ones."""
    out = _Writer(path, "lfm2", seed=seed, **common)
    _transformer_keys(out, n_ctx, n_embd, n_layers, n_ff, n_head, [n_head_kv if i % 2 else 0 for i in range(n_layers)])
    out.w.add_shortconv_l_cache(3)
    out.embeddings(n_embd, output_norm="token_embd_norm.weight")
    for i in range(n_layers):
        out.norm(f"blk.{i}.attn_norm.weight", n_embd)
        if i % 2:
            out.attention(i, n_embd, n_head, n_head_kv, n_embd // n_head)
            out.norm(f"blk.{i}.attn_q_norm.weight", n_embd // n_head, 2.0)
            out.norm(f"blk.{i}.attn_k_norm.weight", n_embd // n_head)
        else:
            out.exact(f"blk.{i}.shortconv.conv.weight", out.rng.normal(0, 0.6, (n_embd, 3)))
            out.random(f"blk.{i}.shortconv.in_proj.weight", 3 * n_embd, n_embd, std=1.5 * n_embd**-0.5)
            out.random(f"blk.{i}.shortconv.out_proj.weight", n_embd, n_embd, std=1.5 * n_embd**-0.5)
        out.feed_forward(i, n_embd, n_ff)
    return out.close()


def write_granite_hybrid(
    path: Path | str,
    *,
    seed: int = 0,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_layers: int = 2,
    n_ff: int = 128,
    n_ctx: int = 2048,
    d_state: int = 16,
    d_conv: int = 4,
    n_ssm_head: int = 4,
    **common: Any,
) -> Path:
    """A Granite-4 hybrid: Mamba-2 in the even layers, attention in the odd ones."""
    out = _Writer(path, "granitehybrid", seed=seed, **common)
    d_inner = 2 * n_embd
    d_conv_in = d_inner + 2 * d_state
    _transformer_keys(out, n_ctx, n_embd, n_layers, n_ff, n_head, [n_head_kv if i % 2 else 0 for i in range(n_layers)])
    _ssm_keys(out, d_conv, d_inner, d_state, n_ssm_head)
    out.w.add_ssm_group_count(1)
    out.w.add_rope_dimension_count(n_embd // n_head)
    out.embeddings(n_embd)
    for i in range(n_layers):
        out.norm(f"blk.{i}.attn_norm.weight", n_embd)
        if i % 2:
            out.attention(i, n_embd, n_head, n_head_kv, n_embd // n_head)
        else:
            out.random(f"blk.{i}.ssm_in.weight", 2 * d_inner + 2 * d_state + n_ssm_head, n_embd, std=2 * n_embd**-0.5)
            out.exact(f"blk.{i}.ssm_conv1d.weight", out.rng.normal(0, 0.5, (d_conv_in, d_conv)))
            out.exact(f"blk.{i}.ssm_conv1d.bias", out.rng.normal(0, 0.1, d_conv_in))
            out.exact(f"blk.{i}.ssm_dt.bias", out.rng.uniform(-3, -1, n_ssm_head))
            out.exact(f"blk.{i}.ssm_a", -np.arange(1, n_ssm_head + 1)[:, None])
            out.exact(f"blk.{i}.ssm_d", np.ones((n_ssm_head, 1)))
            out.exact(f"blk.{i}.ssm_norm.weight", out.rng.uniform(0.7, 1.3, (1, d_inner)))
            out.random(f"blk.{i}.ssm_out.weight", n_embd, d_inner, std=3 * d_inner**-0.5)
        out.feed_forward(i, n_embd, n_ff)
    return out.close()


def _transformer_keys(
    out: _Writer, n_ctx: int, n_embd: int, n_layers: int, n_ff: int, n_head: int, n_head_kv: int | list[int] | None
) -> None:
    out.w.add_context_length(n_ctx)
    out.w.add_embedding_length(n_embd)
    out.w.add_block_count(n_layers)
    out.w.add_feed_forward_length(n_ff)
    out.w.add_head_count(n_head)
    if n_head_kv is not None:
        out.w.add_head_count_kv(n_head_kv)
    out.w.add_layer_norm_rms_eps(1e-5)


def _ssm_keys(out: _Writer, d_conv: int, d_inner: int, d_state: int, dt_rank: int) -> None:
    out.w.add_ssm_conv_kernel(d_conv)
    out.w.add_ssm_inner_size(d_inner)
    out.w.add_ssm_state_size(d_state)
    out.w.add_ssm_time_step_rank(dt_rank)


WRITERS: dict[str, Callable[..., Path]] = {
    "llama": write_llama,
    "qwen2vl": write_qwen2vl,
    "phi3": write_phi3,
    "gemma2": write_gemma2,
    "gemma3": write_gemma3,
    "mamba": write_mamba,
    "lfm2": write_lfm2,
    "granitehybrid": write_granite_hybrid,
}


def write_family(path: Path | str, family: str, *, writer: Callable[..., Path] = write_llama, **kw: Any) -> Path:
    """A tiny model of any architecture with the vocabulary and template of `FAMILIES[family]`; `kw` goes on top."""
    return writer(path, **(FAMILIES[family].writer_args() | kw))

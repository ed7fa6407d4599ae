"""Talks to llama.cpp, as no other module but `binding` does, through llama-cpp-python's low-level C API.

It offers rows in and logits out, operations on KV sequences, text to tokens and back, and samplers; failures come out
as this package's errors. If the binding changes, these two files change and no other.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, NewType, TypeAlias

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import InternalError, ModelError, NumericalError, OutOfMemoryError, StorageError, UsageError
from acd_local.runtime import lifetime
from acd_local.runtime.binding import GGML, LIBC, LOG, C, Opening, load
from acd_local.runtime.binding import supports_gpu_offload as supports_gpu_offload
from acd_local.runtime.embeddings import EmbeddingTable
from acd_local.runtime.gguf_header import SpecialToken
from acd_local.runtime.lifetime import Closing, Owned
from acd_local.runtime.lifetime import DecodeAborted as DecodeAborted
from acd_local.runtime.threads import on_large_stack

Logits = NDArray[np.float32]
# Logits in llama.cpp's own memory: the context's next decode overwrites them, and closing it frees them. Whoever calls
# `Context.logits` copies what it keeps or hands on; all other logits are `Logits`, which belong to whoever has them,
# save for the views that `streams.extend` gives where it is asked to.
LogitsView = NewType("LogitsView", np.ndarray[Any, np.dtype[np.float32]])
TokenIds = NDArray[np.int32]
States = NDArray[np.float32]
Row: TypeAlias = Sequence[int] | NDArray[Any]

ATTR_NORMAL = C.LLAMA_TOKEN_ATTR_NORMAL
ATTR_UNKNOWN = C.LLAMA_TOKEN_ATTR_UNKNOWN
ATTR_UNUSED = C.LLAMA_TOKEN_ATTR_UNUSED
ATTR_CONTROL = C.LLAMA_TOKEN_ATTR_CONTROL
ATTR_USER_DEFINED = C.LLAMA_TOKEN_ATTR_USER_DEFINED
ATTR_LSTRIP = C.LLAMA_TOKEN_ATTR_LSTRIP
ATTR_RSTRIP = C.LLAMA_TOKEN_ATTR_RSTRIP

_TEXT = (ATTR_NORMAL, False)  # attribute bits, and whether it ends an answer, of a token that is text and no more

KV_TYPES = {"f16": C.GGML_TYPE_F16, "q8_0": C.GGML_TYPE_Q8_0}
QUANTIZATIONS = {
    "q4_0": C.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": C.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q8_0": C.LLAMA_FTYPE_MOSTLY_Q8_0,
}

# Rope types that turn by four positions (GGML_ROPE_TYPE_MROPE, _IMROPE): llama.cpp makes a token's, we make a row's.
_SEVERAL_POSITIONS = (8, 40)

# What the binding does not declare, from the library that it loaded.
GGML.ggml_get_name.argtypes = [ctypes.c_void_p]
GGML.ggml_get_name.restype = ctypes.c_char_p
GGML.ggml_nbytes.argtypes = [ctypes.c_void_p]
GGML.ggml_nbytes.restype = ctypes.c_size_t
GGML.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
GGML.ggml_backend_tensor_get.restype = None

# llama_get_logits, with an address as its result: the binding's typed pointer would have to be taken apart every time.
_get_logits = ctypes.cast(C.llama_get_logits, ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p))

# Rows per llama_decode call. Also the granularity of cancellation on backends without an abort callback.
BATCH_ROWS = 512

# Many vocabularies are split by std::regex (unicode_regex_split), which calls itself for every character of a match and
# overflows the stack on long ones. A match is within two runs, one of spaces and one of anything else.
_SHALLOW = 1000  # characters that every thread's stack takes
_DEEP = 200_000  # characters that a large stack takes
_STACK_PER_CHARACTER = 640  # bytes: 324 were measured with libstdc++

# How far a grammar is walked before it is trusted: ambiguous ones grow exponentially slow with the tokens accepted.
TRIAL_STEPS = 32


# libc's strlen as an abort callback: true when the byte it is pointed at is not NUL. ggml calls the abort callback once
# per graph node: a Python function would take the interpreter lock each time.
_abort_if_flag_set = ctypes.cast(LIBC.strlen, C.ggml_abort_callback)


def quantize(source: Path, target: Path, kind: str, *, threads: int = 1) -> None:
    """Write a model with other weight types, as llama-quantize does; what is quantized is requantized.

    Args:
        source: a file that `probe.verify` accepted; of a split model the first part.
        target: where the new file goes, in one part.
        kind: one of QUANTIZATIONS.

    Raises:
        UsageError: unknown `kind`.
        ModelError: llama.cpp cannot (llama_model_quantize).
        StorageError: the file cannot be written to its end.
    """
    if kind not in QUANTIZATIONS:
        raise UsageError(f"unknown quantization {kind!r}: choose one of {', '.join(QUANTIZATIONS)}")
    params = C.llama_model_quantize_default_params()
    params.ftype = QUANTIZATIONS[kind]
    params.nthread = threads
    params.allow_requantize = True
    LOG.problems.clear()
    if int(C.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))) != 0:
        cause = LOG.last_problem("llama.cpp gave no reason")
        if "iostream" in cause:  # all that C++ says of a write that failed
            raise StorageError(f"cannot write {target}: is there room? Another disk may have it (TMPDIR)")
        raise ModelError(f"llama.cpp cannot write {source} as {kind}: {cause}")


# ---------------------------------------------------------------------------------------------------------------------
# Model and vocabulary


class Model(Closing):
    """A loaded GGUF file (llama_model_load_from_file).

    Args:
        path: the file; for a split model its first part. Check it with `probe.verify` first: llama.cpp can abort the
            process on a damaged file. Or a file that is being loaded already, with its own `gpu_layers`.
        gpu_layers: layers to offload; None means all where the build supports it and none elsewhere.
        extra_buffers: keep weights as some CPU kernels like them best; None means unless that was found to crash here.
        special: what is known of the vocabulary's special tokens; None: llama.cpp is asked of every token.
        on_progress: told how much of the file is loaded, from 0 to 1. What it raises ends the loading.

    Attributes:
        owned: llama.cpp's memory of it, and whether that can be used.
        n_params: how many weights the model has.
        embeddings: embedding rows, which `Context.decode` takes by negative ids.
        row_positions: positions that llama.cpp reads per embedding row: 4 for M-RoPE, else 1.
        rewinds: whether a cache can always forget its last tokens alone: no recurrent state, no sliding window.
        rope_by_n_ctx: whether the size of a context decides how positions turn.

    Raises:
        ModelError: llama.cpp refuses the file.
        OutOfMemoryError: the weights do not fit.
    """

    def __init__(
        self,
        path: Path | str | Opening,
        *,
        gpu_layers: int | None = None,
        extra_buffers: bool | None = None,
        special: Sequence[SpecialToken] | None = None,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        self.path = path.info.path if isinstance(path, Opening) else Path(path)
        opened = path.take(self) if isinstance(path, Opening) else None
        self.owned = opened or Owned(self, C.llama_model_free)
        if opened is None:
            LOG.problems.clear()
            if not load(
                self.owned, self.path, gpu_layers=gpu_layers, extra_buffers=extra_buffers, on_progress=on_progress
            ):
                cause = LOG.last_problem("llama.cpp gave no reason")
                if "alloc" in cause:
                    raise OutOfMemoryError(f"not enough memory to load {self.path}: {cause}")
                raise ModelError(f"llama.cpp cannot load {self.path}: {cause}")
        self.vocab = Vocab(self.owned, special)
        self.n_vocab = self.vocab.n_tokens
        with self.owned as pointer:
            self.n_embd = int(C.llama_model_n_embd(pointer))
            self.n_params = int(C.llama_model_n_params(pointer))
            self.n_ctx_train = int(C.llama_model_n_ctx_train(pointer))
            self.n_swa = int(C.llama_model_n_swa(pointer))
            self.keeps_state = bool(C.llama_model_is_recurrent(pointer) or C.llama_model_is_hybrid(pointer))
            input_width, rope_type = int(C.llama_model_n_embd_inp(pointer)), int(C.llama_model_rope_type(pointer))
        self.rewinds = not self.keeps_state and self.n_swa == 0
        architecture = self.metadata("general.architecture") or ""
        self.rope_by_n_ctx = bool(self.metadata(f"{architecture}.rope.scaling.original_context_length"))
        self.embeddings = EmbeddingTable(self.n_embd, input_width, architecture)
        self.row_positions = 4 if rope_type in _SEVERAL_POSITIONS else 1

    def metadata(self, key: str) -> str | None:
        """Read a scalar GGUF metadata value as text, None if absent (llama_model_meta_val_str)."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self.owned as pointer:
                length = int(C.llama_model_meta_val_str(pointer, key.encode(), buffer, size))
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    def chat_template(self) -> str | None:
        """Read the file's Jinja chat template, None if there is none."""
        with self.owned as pointer:
            raw = C.llama_model_chat_template(pointer, None)
        return raw.decode("utf-8", "replace") if raw else None

    def close(self) -> None:
        self.owned.close()


class Vocab:
    """Text to token ids and back, and what each token is (llama_vocab_*). Reading is thread-safe.

    Args:
        special: as this method would find them, which takes 0.2 s at 152k tokens; None: find them when they are needed.

    Attributes:
        model: what the vocabulary is a part of. pointer: to be used inside `with vocab.model:` alone.
    """

    def __init__(self, model: Owned, special: Sequence[SpecialToken] | None = None) -> None:
        self.model = model
        with model as pointer:
            vocab = self.pointer = C.llama_model_get_vocab(pointer)
            self.n_tokens = int(C.llama_vocab_n_tokens(vocab))
        if special is not None and all(token.id < self.n_tokens for token in special):
            self.special = {token.id: token for token in special}
        self.bos = int(C.llama_vocab_bos(vocab))
        self.eos = int(C.llama_vocab_eos(vocab))
        self.add_bos = bool(C.llama_vocab_get_add_bos(vocab))
        self._by_patterns = int(C.llama_vocab_type(vocab)) == C.LLAMA_VOCAB_TYPE_BPE
        self._pieces: dict[int, bytes] = {}

    @cached_property
    def special(self) -> Mapping[int, SpecialToken]:
        """The tokens that are more than plain text, by id, ascending."""
        with self.model:
            attrs = map(C.llama_vocab_get_attr, repeat(self.pointer), range(self.n_tokens))
            ends = map(C.llama_vocab_is_eog, repeat(self.pointer), range(self.n_tokens))
            found = [
                SpecialToken(*row) for row in zip(range(self.n_tokens), attrs, ends, strict=True) if row[1:] != _TEXT
            ]
        return {token.id: token for token in found}

    def attr(self, token: int) -> int:
        """Return the attribute bits of a token, see the ATTR_ constants."""
        return self.special[token].attr if token in self.special else ATTR_NORMAL

    def is_eog(self, token: int) -> bool:
        """Tell whether the token ends an answer (EOS, EOT, ...)."""
        return token in self._eog

    def eog_tokens(self) -> frozenset[int]:
        """List all tokens that end an answer."""
        return self._eog

    @cached_property
    def _eog(self) -> frozenset[int]:
        return frozenset(token.id for token in self.special.values() if token.ends)

    def suppressed_tokens(self) -> frozenset[int]:
        """List tokens that the model file says are never to be sampled (tokenizer.ggml.suppress_tokens)."""
        count = ctypes.c_int32(0)
        with self.model:
            tokens = C.llama_vocab_get_suppress_tokens(self.pointer, ctypes.byref(count))
            return frozenset(int(tokens[i]) for i in range(count.value)) if tokens else frozenset()

    def text(self, token: int) -> str:
        """Return the vocabulary's text of a token (not unescaped); control tokens read as templates write them."""
        with self.model:
            return bytes(C.llama_vocab_get_text(self.pointer, token)).decode("utf-8", "replace")

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Turn text into token ids without BOS (llama_tokenize with add_special=False).

        With `parse_special` control tokens written in the text become control tokens: for template scaffolding only.
        """
        if not self._by_patterns or len(text) <= _SHALLOW:
            return self._tokenize(C.llama_tokenize, text, parse_special)
        deep = partial(on_large_stack, _DEEP * _STACK_PER_CHARACTER, C.llama_tokenize)
        return [token for part in _without_long_runs(text) for token in self._tokenize(deep, part, parse_special)]

    def _tokenize(self, tokenize: Callable[..., int], text: str, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
        capacity = len(raw) + 8
        while True:
            out = (C.llama_token * capacity)()
            with self.model:
                n = int(tokenize(self.pointer, raw, len(raw), out, capacity, False, parse_special))
            if n >= 0:
                return list(out[:n])
            if n == -(2**31):
                raise UsageError("the text is too long to tokenize (over 2^31 tokens)")
            capacity = -n

    def piece(self, token: int) -> bytes:
        """Return the bytes a token adds to the text; empty for control tokens (llama_token_to_piece)."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token, special=False)
        return piece

    def literal(self, token: int) -> str:
        """Return the token's text with control tokens written out, as chat templates write them."""
        return self._read_piece(token, special=True).decode("utf-8", "replace")

    def _read_piece(self, token: int, *, special: bool) -> bytes:
        size = 32
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self.model:
                n = int(C.llama_token_to_piece(self.pointer, token, buffer, size, 0, special))
            if n >= 0:
                return buffer.raw[:n]
            size = -n  # a longer piece is not cut: ask again with its size


def _without_long_runs(text: str) -> list[str]:
    """Cut a text within runs that are too long: base64 or spaces by the hundred thousand, rather than words."""
    if len(text) <= _DEEP // 2:
        return [text]
    runs = re.finditer(r"\s+|\S+", text)
    cuts = [at for run in runs for at in range(run.start() + _DEEP // 2, run.end(), _DEEP // 2)]
    return [text[i:j] for i, j in pairwise((0, *cuts, len(text)))]


# ---------------------------------------------------------------------------------------------------------------------
# Context: KV sequences


class Context(Closing):
    """A llama_context with `n_seq` KV sequences of `n_ctx` tokens each, every sequence in a buffer of its own.

    kv_unified is off: llama.cpp then gives each sequence n_ctx / n_seq_max cells, picks the long-rope factors by that
    number (llama_model::get_rope_factors), and one stream's rows do not attend over the other's cells.

    Args:
        n_ctx: tokens per sequence.
        kv_type: "f16" or "q8_0".
        threads: CPU threads.
        outputs: logits rows that one sequence may ask for per decode.
        together: whether several sequences may ask for as many in one decode: memory for n_seq x outputs x n_vocab.
        capture: layers whose output `captured` gives after a decode. Python is then called for every graph node, about
            a millisecond a decode: not for a context that writes answers.
        lock: held while llama.cpp uses the context, and while it is freed. Threads that share contexts give one of
            their own and hold it from a decode until they have read its logits.

    Raises:
        UsageError: the model's head size cannot take this KV type.
        OutOfMemoryError: the KV cache or compute buffers do not fit.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_seq: int,
        kv_type: str = "f16",
        threads: int = 1,
        outputs: int = 1,
        together: bool = True,
        capture: Sequence[int] = (),
        lock: Any = None,
    ) -> None:
        if kv_type not in KV_TYPES:
            raise UsageError(f"unknown KV type {kv_type!r}: choose one of {', '.join(KV_TYPES)}")
        if n_seq > C.llama_max_parallel_sequences():
            raise UsageError(f"llama.cpp holds at most {C.llama_max_parallel_sequences()} sequences, not {n_seq}")
        if n_seq * (n_ctx + 255) >= 2**31:
            raise UsageError(f"a context of {n_seq} x {n_ctx} tokens is more than llama.cpp can count")
        self.model = model
        self.n_ctx = n_ctx
        self.n_seq = n_seq
        self._outputs = outputs
        params = C.llama_context_default_params()
        params.n_ctx = n_seq * -(-n_ctx // 256) * 256  # llama.cpp rounds each sequence up to 256 cells
        params.n_seq_max = n_seq
        params.n_batch = params.n_ubatch = BATCH_ROWS
        # Logits rows per decode: sizes the output matrix' compute buffer.
        params.n_outputs_max = min(BATCH_ROWS, max(32, n_seq * outputs if together else outputs))
        params.n_outputs_max_per_seq = outputs
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv_type]
        params.kv_unified = False
        params.swa_full = False  # windows take what they need; Cache.rewind checks what a rollback left
        params.no_perf = True
        self._capture = _Capture(capture, model.n_embd) if capture else None
        if self._capture is not None:
            params.cb_eval = self._capture.callback
        self._flag = flag = ctypes.create_string_buffer(2)
        self.owned = Owned(self, partial(_free_context, model), lock=lock, stop=partial(_raise_flag, flag))
        LOG.problems.clear()
        with model.owned as of:
            pointer = self.owned.make(lambda: C.llama_init_from_model(of, params))
        if not pointer:
            cause = LOG.last_problem("llama.cpp gave no reason")
            if "cache type" in cause:
                raise UsageError(f"KV type {kv_type} does not fit this model, use --kv-type f16 ({cause})")
            raise OutOfMemoryError(
                f"could not create a context of {n_seq} x {n_ctx} tokens, try a smaller --ctx-size"
                f"{' or --parallel' if n_seq > 2 else ''} ({cause})"
            )
        if n_ctx > int(C.llama_n_ctx_seq(pointer)):
            self.close()
            raise OutOfMemoryError(f"llama.cpp made a context smaller than {n_ctx} tokens, try a smaller --ctx-size")
        self._memory = C.llama_get_memory(pointer)
        self.n_batch = int(C.llama_n_batch(pointer))
        C.llama_set_abort_callback(pointer, _abort_if_flag_set, ctypes.cast(flag, ctypes.c_void_p))
        self._rows = _BatchRows(self.n_batch, model.embeddings, model.row_positions)
        self._logits: int | None = None  # where the last decode's are
        self._view = LogitsView(np.empty((0, 0), np.float32))
        self._view_of = (0, 0)
        self.seconds = 0.0  # spent inside llama.cpp by decode(), for the benchmark

    def decode(self, tokens: Row, seqs: Row, positions: Row, outputs: Row, *, captured_alone: bool = False) -> None:
        """Run one batch of rows, all arguments of shape (rows,), rows <= n_batch (llama_decode).

        Args:
            tokens: token ids, or the negative ids of embedding rows (`Model.embeddings`), not both in one batch.
            captured_alone: stop behind the last captured layer. The logits are then none, and of later layers the
                cache holds nothing for these rows: what follows them may be captured, and no more.

        Raises:
            DecodeAborted: `cancel()` was called, or the process is ending; rows of unfinished batches are not in the
                caches.
            InternalError: more rows of a sequence want logits than the context was made for.
        """
        wanted = sum(outputs)
        if wanted > self._outputs:
            self._check_outputs(seqs, outputs)
        if self.cancelled:  # not every backend asks the abort callback
            raise DecodeAborted
        with self.owned as pointer:
            batch = self._rows.fill(tokens, seqs, positions, outputs)
            if self._capture is not None:
                self._capture.begin(stop=captured_alone)
            lifetime.note_use()
            started = time.perf_counter()
            result = int(C.llama_decode(pointer, batch))
            self._logits = _get_logits(pointer) if result == 0 and wanted else None  # waits for the backend
            self.seconds += time.perf_counter() - started
        if self._capture is not None:
            self._capture.check()
        if result == 0:
            return
        if result == 2:
            raise DecodeAborted
        if result == -2:
            raise OutOfMemoryError("llama.cpp ran out of memory while decoding, try a smaller --ctx-size")
        raise InternalError(f"llama_decode failed with {result}: {LOG.last_problem('no message')}")

    def _check_outputs(self, seqs: Row, outputs: Row) -> None:
        """Refuse rows that are too many: llama.cpp aborts the process where its buffer is too small."""
        most = int(np.bincount(np.asarray(seqs)[np.asarray(outputs, bool)]).max())
        if most > self._outputs:
            raise InternalError(f"{most} rows of a sequence want logits, this context was made for {self._outputs}")

    def logits(self, n_outputs: int) -> LogitsView:
        """Return the last decode's logits, shape (n_outputs, n_vocab), in the order of the rows that asked for them.

        Source: llama_get_logits.
        """
        self.owned.check()
        if not (address := self._logits):
            raise InternalError("llama.cpp returned no logits")
        if (address, n_outputs) != self._view_of:  # llama.cpp rarely moves its buffer
            size = n_outputs * self.model.n_vocab
            flat: Logits = np.frombuffer((ctypes.c_float * size).from_address(address), np.float32)  # type: ignore[call-overload]
            self._view = LogitsView(flat.reshape(n_outputs, self.model.n_vocab))
            self._view_of = address, n_outputs
        return self._view

    def control(self, vectors: States) -> None:
        """Add vectors to the output of layers from now on, at every row of every sequence (llama_set_adapter_cvec).

        Args:
            vectors: float32, shape (layers - 1, n_embd): of each layer from the second one on. llama.cpp copies them.

        Raises:
            ModelError: llama.cpp takes none.
        """
        pointer = np.ascontiguousarray(vectors, np.float32).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        with self.owned as context:
            done = C.llama_set_adapter_cvec(context, pointer, vectors.size, vectors.shape[1], 1, len(vectors))
        if done != 0:
            raise ModelError(f"llama.cpp takes no control vectors for this model: {LOG.last_problem('no message')}")

    def give_hidden(self, wanted: bool) -> None:
        """Have the coming decodes give all rows' last hidden states, and logits, or not (llama_set_embeddings)."""
        with self.owned as pointer:
            C.llama_set_embeddings(pointer, wanted)

    def hidden(self, rows: int) -> States:
        """Return the last hidden states of the last decode's rows, shape (rows, n_embd) (llama_get_embeddings)."""
        with self.owned as pointer:
            found = C.llama_get_embeddings(pointer)
            if not found:
                raise ModelError("llama.cpp gives no hidden states of this model")
            return np.ctypeslib.as_array(found, (rows, self.model.n_embd)).copy()

    def captured(self) -> States:
        """Return the captured layers' output for the rows of the last decode, float32, shape (layers, rows, n_embd).

        Raises:
            ModelError: llama.cpp names no such layer in this architecture.
        """
        assert self._capture is not None
        return self._capture.states()

    def truncate(self, seq: int, length: int) -> bool:
        """Drop positions >= length from a sequence; False where the memory cannot (llama_memory_seq_rm)."""
        with self.owned:
            return bool(C.llama_memory_seq_rm(self._memory, seq, length, -1))

    def position_range(self, seq: int) -> tuple[int, int]:
        """Return the smallest and largest position present, (-1, -1) when empty (llama_memory_seq_pos_min / _max)."""
        with self.owned:
            found = C.llama_memory_seq_pos_min(self._memory, seq), C.llama_memory_seq_pos_max(self._memory, seq)
        return int(found[0]), int(found[1])

    def save_sequence(self, seq: int) -> bytes:
        """Return the sequence's cells (or recurrent state) as bytes (llama_state_seq_get_data)."""
        with self.owned as pointer:
            size = int(C.llama_state_seq_get_size(pointer, seq))
            buffer = (ctypes.c_uint8 * size)()
            written = int(C.llama_state_seq_get_data(pointer, buffer, size, seq))
        if written == 0:
            raise InternalError("llama.cpp could not save a sequence")
        return bytes(memoryview(buffer)[:written])

    def load_sequence(self, seq: int, state: bytes | memoryview) -> None:
        """Replace a sequence by a saved one (llama_state_seq_set_data)."""
        source = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        with self.owned as pointer:
            read = int(C.llama_state_seq_set_data(pointer, source, len(state), seq))
        if read == 0:
            raise InternalError(f"llama.cpp could not restore a sequence: {LOG.last_problem('no message')}")

    def cancel(self) -> None:
        """Stop a running decode within one graph node (CPU), and refuse new ones. Safe from any thread."""
        _raise_flag(self._flag)

    def resume(self) -> None:
        """Allow decoding again after `cancel()`, but for a process that is ending."""
        if not lifetime.ending():
            self._flag[0] = b"\0"

    @property
    def cancelled(self) -> bool:
        return self._flag[0] != b"\0"

    def close(self) -> None:
        self.owned.close()


def _free_context(_model: Model, pointer: Any) -> None:
    """Free a context; the model is an argument as it must outlive its contexts, however garbage is collected."""
    C.llama_free(pointer)


def _raise_flag(flag: Any) -> None:
    flag[0] = b"x"


class _Capture:
    """ggml's evaluation callback: copies the output of some layers while a graph runs.

    llama.cpp's models call it "l_out-LAYER" (llm_graph_context::cb); the callback is asked for every node, then told of
    those that it wants (ggml_backend_sched_eval_callback).
    """

    def __init__(self, layers: Sequence[int], n_embd: int) -> None:
        self._names = [b"l_out-%d" % layer for layer in layers]
        self._last = self._names[int(np.argmax(layers))]
        self._wanted = frozenset(self._names)
        self._n_embd = n_embd
        self._found: dict[bytes, list[NDArray[np.float32]]] = {}
        self._stop = False
        self._raised: BaseException | None = None
        self.callback = C.ggml_backend_sched_eval_callback(self._visit)

    def begin(self, *, stop: bool) -> None:
        self._found.clear()
        self._stop, self._raised = stop, None

    def check(self) -> None:
        """Raise what went wrong inside the callback: C cannot pass it on."""
        if self._raised is not None:
            raise self._raised

    def states(self) -> States:
        if not self._found.keys() >= self._wanted:
            raise ModelError("llama.cpp does not name the layers of this architecture: its states cannot be read")
        return np.stack([np.concatenate(self._found[name]) for name in self._names])

    def _visit(self, tensor: int, ask: bool, _user_data: object) -> bool:
        try:
            name = bytes(GGML.ggml_get_name(tensor))
            if name not in self._wanted:
                return False
            if not ask:
                values = np.empty(GGML.ggml_nbytes(tensor) // 4, np.float32)
                GGML.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
                self._found.setdefault(name, []).append(values.reshape(-1, self._n_embd))
                return not (self._stop and name == self._last)
        except BaseException as error:
            self._raised = error
            return False
        return True


class _BatchRows:
    """A llama_batch over numpy memory, filled by slices instead of element by element.

    It holds token ids (`token`, embd is NULL) or embedding rows (`embd`, token is NULL); llama.cpp reads n_embd_inp
    numbers per row without a check, which is what EmbeddingTable makes sure of.
    """

    def __init__(self, capacity: int, table: EmbeddingTable, row_positions: int) -> None:
        self._table = table
        self._row_positions = row_positions
        self._embd = np.empty((0, table.width), np.float32)
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity * row_positions, np.int32)
        self._n_seq = np.ones(capacity, np.int32)
        self._seq = np.zeros(capacity, np.int32)
        self._output = np.zeros(capacity, np.int8)
        rows = self._seq.ctypes.data + np.arange(capacity, dtype=np.uintp) * self._seq.itemsize
        self._seq_rows = np.ascontiguousarray(rows)  # llama_batch.seq_id: one pointer per row
        self._batch = C.llama_batch()
        fields = {f[0]: f[1] for f in C.llama_batch._fields_}
        for name, array in (
            ("token", self._token),
            ("pos", self._pos),
            ("n_seq_id", self._n_seq),
            ("seq_id", self._seq_rows),
            ("logits", self._output),
        ):
            setattr(self._batch, name, ctypes.cast(array.ctypes.data, fields[name]))
        self._token_pointer = ctypes.cast(self._token.ctypes.data, fields["token"])
        self._embd_type = fields["embd"]

    def fill(self, tokens: Row, seqs: Row, positions: Row, outputs: Row) -> Any:
        n = len(tokens)
        if n > len(self._token):
            raise InternalError(f"a batch of {n} rows exceeds the {len(self._token)} this context takes")
        self._seq[:n] = seqs
        self._pos[:n] = positions
        self._output[:n] = outputs
        self._batch.n_tokens = n
        if n and tokens[0] < 0:
            self._fill_rows(tokens, n)
        else:  # llama.cpp itself refuses a negative id among tokens
            self._token[:n] = tokens
            self._batch.token, self._batch.embd = self._token_pointer, None
        return self._batch

    def _fill_rows(self, ids: Row, n: int) -> None:
        try:
            self._embd = self._table.take(ids)
        except IndexError:
            raise InternalError("a batch holds tokens and embedding rows, or rows that nobody registered") from None
        if self._embd.shape != (n, self._table.width) or not self._embd.flags.c_contiguous:
            raise InternalError(f"embedding rows of shape {self._embd.shape} for {n} rows of {self._table.width}")
        self._batch.token, self._batch.embd = None, ctypes.cast(self._embd.ctypes.data, self._embd_type)
        if self._row_positions > 1:  # section by section, as llama.cpp makes them for tokens: time, height, width, 0
            sections = self._pos[: n * self._row_positions].reshape(self._row_positions, n)
            sections[1:-1] = sections[0]
            sections[-1] = 0


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


class Candidates:
    """llama_token_data_array over numpy memory: the candidate list that llama.cpp's samplers narrow down."""

    DTYPE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

    def __init__(self, n_vocab: int) -> None:
        self._data = np.zeros(n_vocab, self.DTYPE)
        self._address = ctypes.cast(self._data.ctypes.data, C.llama_token_data_p)
        self._array = C.llama_token_data_array()
        self._ref = ctypes.byref(self._array)

    def fill(self, ids: TokenIds, scores: Logits) -> None:
        """Set the list to `ids` with `scores`, both of shape (n,), in ascending id order."""
        n = len(ids)
        self._data["id"][:n] = ids
        self._data["logit"][:n] = scores
        self._data["p"][:n] = 0.0
        self._array.data = self._address
        self._array.size = n
        self._array.selected = -1
        self._array.sorted = False

    def apply(self, sampler: Sampler) -> None:
        C.llama_sampler_apply(sampler.pointer, self._ref)

    def selected(self) -> int:
        """Return the id that the last sampler chose."""
        index = int(self._array.selected)
        if not 0 <= index < int(self._array.size):
            raise NumericalError("the sampler chose no token: no candidate was left")
        return int(self._array.data[index].id)

    def scores(self) -> Logits:
        """Return the scores in list order; only meaningful while no sampler reordered the list."""
        return self._data["logit"][: int(self._array.size)]


class Sampler:
    """Owner of one llama_sampler."""

    def __init__(self, pointer: Any) -> None:
        self._ptr = pointer

    @property
    def pointer(self) -> Any:
        return self._ptr

    def accept(self, token: int) -> None:
        C.llama_sampler_accept(self._ptr, token)

    def clone(self) -> Sampler:
        return Sampler(C.llama_sampler_clone(self._ptr))

    def release(self) -> Any:
        """Give the llama_sampler to another owner."""
        pointer, self._ptr = self._ptr, None
        return pointer

    def close(self) -> None:
        if self._ptr:
            C.llama_sampler_free(self.release())

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


def chain(samplers: Sequence[Sampler]) -> Sampler:
    """Make one sampler of several, which it takes over."""
    made = Sampler(C.llama_sampler_chain_init(C.llama_sampler_chain_default_params()))
    for sampler in samplers:
        C.llama_sampler_chain_add(made.pointer, sampler.release())
    return made


def greedy() -> Sampler:
    return Sampler(C.llama_sampler_init_greedy())


def dist(seed: int) -> Sampler:
    return Sampler(C.llama_sampler_init_dist(seed))


def top_k(k: int) -> Sampler:
    return Sampler(C.llama_sampler_init_top_k(k))


def top_p(p: float) -> Sampler:
    return Sampler(C.llama_sampler_init_top_p(p, 0))


def min_p(p: float) -> Sampler:
    return Sampler(C.llama_sampler_init_min_p(p, 0))


def typical(p: float) -> Sampler:
    return Sampler(C.llama_sampler_init_typical(p, 0))


def temperature(t: float) -> Sampler:
    return Sampler(C.llama_sampler_init_temp(t))


def xtc(probability: float, threshold: float, seed: int) -> Sampler:
    return Sampler(C.llama_sampler_init_xtc(probability, threshold, 0, seed))


def penalties(n_vocab: int, last_n: int, repeat: float, frequency: float, presence: float) -> Sampler:
    return Sampler(C.llama_sampler_init_penalties(n_vocab, last_n, repeat, frequency, presence))


def mirostat_v1(n_vocab: int, seed: int, tau: float, eta: float) -> Sampler:
    return Sampler(C.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, 100))


def mirostat_v2(seed: int, tau: float, eta: float) -> Sampler:
    return Sampler(C.llama_sampler_init_mirostat_v2(seed, tau, eta))


def dry(
    vocab: Vocab, multiplier: float, base: float, allowed_length: int, last_n: int, breakers: Sequence[str]
) -> Sampler:
    raw = (ctypes.c_char_p * len(breakers))(*(b.encode() for b in breakers))
    with vocab.model:
        return Sampler(
            C.llama_sampler_init_dry(vocab.pointer, multiplier, base, allowed_length, last_n, raw, len(breakers))
        )


def grammar(vocab: Vocab, gbnf: str) -> Sampler:
    """Make a GBNF grammar. Check it with `grammar.check` first: llama.cpp writes what is wrong to stderr, or aborts."""
    with vocab.model:
        sampler = C.llama_sampler_init_grammar(vocab.pointer, gbnf.encode(), b"root")
    if not sampler:
        raise UsageError("llama.cpp refuses the grammar")
    return Sampler(sampler)


def try_grammar(model_path: Path, gbnf: str) -> None:
    """Parse a grammar against a model's vocabulary and walk some random tokens through it, in this process.

    llama.cpp reports faults on stderr, and some only by aborting or by never returning: run it in a child process.

    Raises:
        UsageError: llama.cpp refuses the grammar.
    """
    params = C.llama_model_default_params()
    params.vocab_only = True
    owned = Owned(None, C.llama_model_free)
    if not owned.make(lambda: C.llama_model_load_from_file(os.fsencode(model_path), params)):
        raise ModelError(f"llama.cpp cannot load the vocabulary of {model_path}")
    vocab = Vocab(owned)
    LOG.problems.clear()
    try:
        sampler = grammar(vocab, gbnf)
    except UsageError:
        raise UsageError(LOG.last_problem("llama.cpp refuses the grammar")) from None
    everything, flat = np.arange(vocab.n_tokens, dtype=np.int32), np.zeros(vocab.n_tokens, np.float32)
    candidates, rng = Candidates(vocab.n_tokens), np.random.default_rng(0)
    for _ in range(TRIAL_STEPS):
        candidates.fill(everything, flat)
        candidates.apply(sampler)
        legal = [t for t in np.flatnonzero(candidates.scores() > -np.inf).tolist() if not vocab.is_eog(t)]
        if not legal:
            break
        sampler.accept(int(rng.choice(legal)))

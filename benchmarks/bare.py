"""Do what bare.c does through llama-cpp-python's declarations alone, for machines without a C compiler.

python bare.py MODEL N_CTX N_THREADS GPU_LAYERS EXTRA_BUFFERS N_TOKENS ID...
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

started = time.perf_counter()
from llama_cpp import llama_cpp as C  # noqa: E402 - its time counts


def main(path: str, *given: str) -> None:
    n_ctx, threads, gpu_layers, extra, n_tokens, *ids = map(int, given)
    silence = C.llama_log_callback(lambda *_: None)
    C.llama_log_set(silence, None)
    C.llama_backend_init()
    params = C.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = gpu_layers, bool(extra)
    model = C.llama_model_load_from_file(path.encode(), params)
    times = [time.perf_counter()]
    wanted = C.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = n_ctx, 512, 512
    wanted.n_threads = wanted.n_threads_batch = threads
    context = C.llama_init_from_model(model, wanted)
    times.append(time.perf_counter())
    vocab = C.llama_model_get_vocab(model)
    size, piece = C.llama_vocab_n_tokens(vocab), ctypes.create_string_buffer(256)
    for said in range(n_tokens):
        tokens = (C.llama_token * len(ids))(*ids)
        assert C.llama_decode(context, C.llama_batch_get_one(tokens, len(ids))) == 0
        if said == 0:
            times.append(time.perf_counter())
        logits = C.llama_get_logits_ith(context, -1)[:size]
        ids = [max(range(size), key=logits.__getitem__)]
        length = C.llama_token_to_piece(vocab, ids[0], piece, len(piece), 0, False)
        sys.stdout.buffer.write(piece.raw[: max(length, 0)])
        sys.stdout.flush()
    times.append(time.perf_counter())
    C.llama_free(context)
    C.llama_model_free(model)
    times.append(time.perf_counter())
    begun = [started, *times]
    names = ("load", "context", "prompt", "answer", "free")
    print(json.dumps({n: b - a for n, a, b in zip(names, begun, times, strict=False)}), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])

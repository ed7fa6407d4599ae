"""Makes the datastore of Reference Trustable Decoding from safeguarded answers to anchors, and keeps it.

Harmful instructions are answered under the pair's safeguarding prompt, ordinary ones by the model as it is. Refusals of
the former and answers of the latter are then read under no prompt, which is what the datastore is asked about.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from acd_local import files, models
from acd_local.engine import Engine
from acd_local.errors import ModelError
from acd_local.evaluate.sets import item_seed
from acd_local.fit.model import LONGEST
from acd_local.fit.replies import Style, greedy, labelled
from acd_local.pairs import PromptPair
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import PromptSetup
from acd_local.runtime.references import References, StateContext
from acd_local.runtime.template import Message
from acd_local.tuning import anchors
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.cache import key_of, model_folder

ASKED = 64  # instructions of each kind
TOKENS = 48  # of an answer that are read


def make(engine: Engine, pair: PromptPair, *, stop: CancelToken, asked: int = ASKED) -> References:
    """Return the datastore for a model and a pair: the kept one, or a new one.

    Args:
        asked: instructions of each kind.

    Raises:
        ModelError: the safeguarding prompt has the model refuse nothing, or it answers nothing.
        StorageError, UsageError: it cannot be kept.
        Stopped: `stop` was set.
    """
    chosen = {kind: _chosen(kind)[:asked] for kind in ("harmful", "ordinary")}
    what = {"safe": [pair.safe, pair.shots], "ids": [i.id for g in chosen.values() for i in g]}
    path = model_folder("references", models.sha256_of(engine.info.path)) / f"{key_of(what)[:16]}.npz"
    if path.exists():
        with np.load(io.BytesIO(path.read_bytes())) as kept:
            return References.of(kept["states"], kept["tokens"])
    said = _answered(engine, Style(PromptSetup(pair.safe, shots=pair.shots)), chosen["harmful"], "refusal", stop)
    said += _answered(engine, Style(), chosen["ordinary"], "answer", stop)
    states, tokens = _read(engine, said)
    data = io.BytesIO()
    np.savez(data, states=states, tokens=tokens)
    files.replace_file(path, data.getvalue(), mode=files.PRIVATE)
    return References.of(states, tokens)


def _chosen(kind: str) -> list[Instruction]:
    """Choose instructions that a fit trains on, not those that it validates with."""
    every = [i for i in anchors.builtin() if i.group == kind and not i.validates]
    return sorted(every, key=lambda i: item_seed(0, i.id))


def _answered(
    engine: Engine, style: Style, asked: Sequence[Instruction], label: str, stop: CancelToken
) -> list[tuple[str, list[int]]]:
    """List prompts and the tokens of their answers, where these are what the label says."""
    found = []
    style = replace(style, declines=label == "refusal")
    prompts = [i.prompt[:LONGEST] for i in asked]
    for prompt, tokens in greedy(engine, style, prompts, stop):
        if tokens and labelled(engine.vocab, style, prompt, tokens).label == label:
            found.append((prompt, tokens[:TOKENS]))
    if not found:
        raise ModelError(
            f"there is nothing to refer to: of {len(asked)} answers to instructions none was of the kind {label!r}"
        )
    return sorted(found)


def _read(engine: Engine, said: Sequence[tuple[str, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Read the last hidden states behind which each token of the answers follows, under no prompt."""
    states, tokens = [], []
    model, threads = engine.decoder.model, engine.threads
    with (
        engine.decoder.open(),
        StateContext(model, n_ctx=engine.n_ctx, n_seq=1, threads=threads, outputs=TOKENS) as one,
    ):
        for prompt, answer in said:
            read = engine.template.encode([Message("user", prompt)])
            rows = [*read, *answer[:-1]]
            n = len(rows)
            if n > one.n_batch or n > engine.n_ctx:
                continue
            one.truncate(0, 0)
            one.decode(rows, [0] * n, range(n), [0] * (n - len(answer)) + [1] * len(answer))
            states.append(one.states())
            tokens += answer
    return np.concatenate(states).astype(np.float32), np.array(tokens, np.int32)

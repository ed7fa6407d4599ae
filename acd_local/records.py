"""Writes answers, and what happens to them, as JSON objects: one form for files, the worker and the server."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from acd_local.answers import GateDecision
from acd_local.pairs import AS_IS, fitted

if TYPE_CHECKING:
    from acd_local.answers import Answer, TokenRecord
    from acd_local.engine import Engine
    from acd_local.options import Options
    from acd_local.pairs import PromptPair


def pair_name(pair: PromptPair | None) -> str:
    return AS_IS if pair is None else pair.name


def pair_record(engine: Engine, pair: PromptPair | None, options: Options) -> dict[str, Any]:
    """Say what is in use: name ("as-is": no pair), whether it is fitted to the model, its soft prompts, its gate."""
    return {
        "name": pair_name(pair),
        "fitted": pair is not None and fitted(pair, engine.info),
        "soft": engine.takes_soft(pair),
        "gate": pair is not None and pair.gate is not None and options.gate is not False,
    }


def model_record(engine: Engine) -> dict[str, Any]:
    """Say what is known of the model, but for where it lies."""
    info = engine.info
    return {
        "name": info.name,
        "size": info.size,
        "architecture": info.architecture,
        "quantization": info.file_type,
        "n_params": engine.n_params,
        "n_vocab": info.n_vocab,
        "context_length": info.context_length,
    }


def answer_record(answer: Answer) -> dict[str, Any]:
    """text, finish_reason, usage, timings (seconds), seed, contrast: under the names of `Answer`."""
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "prompt_decoded": answer.prompt_decoded,
            "completion_tokens": answer.completion_tokens,
        },
        "timings": {
            "prompt_seconds": round(answer.timings.prompt_seconds, 6),
            "answer_seconds": round(answer.timings.answer_seconds, 6),
            "tokens_per_second": round(answer.timings.tokens_per_second, 3),
            "drafted": answer.timings.drafted,
            "accepted": answer.timings.accepted,
        },
        "seed": answer.seed,
        "contrast": contrast_record(answer),
        "gate": gate_record(answer),
    }


def contrast_record(answer: Answer) -> dict[str, Any]:
    c = answer.contrast
    kl = c.mean_divergence
    return {
        "alpha": c.alpha,
        "beta": c.beta,
        "raw": c.raw,
        "positions": c.positions,
        "changed_tokens": c.changed_tokens,
        "compared": c.compared,
        "mean_divergence": None if kl is None or not math.isfinite(kl) else round(kl, 6),
    }


def gate_record(answer: Answer) -> dict[str, Any] | None:
    gate = answer.gate
    if gate is None:
        return None
    return {
        "probability": round(gate.probability, 6),
        "decision": gate.decision,
        "contrast_from": gate.contrast_from,
        "looks": [[position, round(probability, 6)] for position, probability in gate.looks],
    }


def decision_record(decision: GateDecision) -> dict[str, Any]:
    """Make the `gate` of a line of --trace, or of an event of the worker."""
    return {
        "probability": round(decision.probability, 6),
        "decision": decision.decision,
        "position": decision.position,
    }


def trace_records(answer: Answer) -> list[dict[str, Any]]:
    """Make the lines of --trace: one for every token, and one in front of it where the gate decided something."""
    records = [trace_record(token) for token in answer.tokens]
    if (gate := answer.gate) is not None:
        if gate.contrast_from:
            turned = GateDecision(gate.looks[-1][1], "contrast", gate.contrast_from)
            records.insert(gate.contrast_from, {"gate": decision_record(turned)})
        records.insert(0, {"gate": decision_record(GateDecision(gate.probability, gate.decision))})
    return records


def trace_record(token: TokenRecord) -> dict[str, Any]:
    """Make one line of --trace, or one `trace` event: `divergence` only where it was asked for."""
    divergence = {} if token.divergence is None else {"divergence": _finite(token.divergence)}
    return {
        "token": token.token,
        "text": token.text,
        "changed": token.changed,
        "safe_token": token.safe_token,
        "safe_text": token.safe_text,
        "safe_logprob": _finite(token.safe_logprob),
        "safe_rank": token.safe_rank,
        **divergence,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)

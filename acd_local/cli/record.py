"""The readable form of an answer, for --stats and the chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from acd_local.records import pair_record

if TYPE_CHECKING:
    from acd_local.answers import Answer, GateRecord
    from acd_local.engine import Engine
    from acd_local.options import Options
    from acd_local.pairs import PromptPair


def pair_line(engine: Engine, pair: PromptPair | None, options: Options) -> str:
    """Which pair is in use, for --stats."""
    return f"pair       {pair_label(engine, pair, options)}"


def pair_label(engine: Engine, pair: PromptPair | None, options: Options) -> str:
    """default (not fitted), smollm2-135m-instruct (fitted, soft, gate), as-is"""
    found = pair_record(engine, pair, options)
    if pair is None:
        return str(found["name"])
    words = ["fitted" if found["fitted"] else "not fitted", *(key for key in ("soft", "gate") if found[key])]
    return f"{found['name']} ({', '.join(words)})"


def stats_lines(answer: Answer) -> list[str]:
    """The readable form for stderr."""
    c, t = answer.contrast, answer.timings
    seen = f", compared at {c.compared / c.positions:.0%}" if c.alpha > 0 and c.positions else ""
    kl = "" if c.mean_divergence is None else f", mean KL(S||A) {c.mean_divergence:.3f} nats"
    what = "plain (no contrast)" if c.alpha == 0 else f"alpha {c.alpha:g}, beta {c.beta:g}{', raw' if c.raw else ''}"
    safe, adversarial = answer.context_used
    drafts = f", {t.accepted} of {t.drafted} drafted tokens accepted" if t.drafted else ""
    gate = [] if answer.gate is None else [f"gate       {_gate_text(answer.gate)}"]
    return [
        f"finish     {answer.finish_reason}, seed {answer.seed}",
        f"tokens     {answer.prompt_tokens} prompt, {answer.completion_tokens} answer; "
        f"context {safe} safe, {adversarial} adversarial",
        f"contrast   {what}: {c.changed_tokens} of {c.positions} tokens changed{seen}{kl}",
        *gate,
        f"time       {t.prompt_seconds:.2f} s to the first token ({answer.prompt_decoded} rows decoded), "
        f"{t.answer_seconds:.2f} s answer, {t.tokens_per_second:.1f} tokens/s{drafts}",
    ]


def _gate_text(gate: GateRecord) -> str:
    who = {"helpful": "the helpful prompt", "as-is": "the model as it is", "contrast": "the pair"}[gate.decision]
    text = f"chance of harm {gate.probability:.3f}: {who}"
    if gate.looks:
        text += f"; {len(gate.looks)} later readings, at most {max(p for _, p in gate.looks):.3f}"
    return f"{text}, the pair from token {gate.contrast_from} on" if gate.contrast_from else text

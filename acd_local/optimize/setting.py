"""The setting's stage: alpha and beta of the soft pair and of the texts, and what came before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeAlias

from acd_local import pairs
from acd_local.optimize import trial
from acd_local.optimize.job import TITLES, Clock
from acd_local.optimize.scoring import GROUPS, SettingRow, candidates, choose
from acd_local.optimize.stages import Checkpoint, go_on
from acd_local.optimize.trial import Trial
from acd_local.optimize.workshop import ORDER, Role, Workshop, measures
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.runtime.prompts import Framing
from acd_local.softpair import SoftPair, SoftPrompt

Prompts: TypeAlias = tuple[str | SoftPrompt, str | SoftPrompt]  # safeguarding, adversarial

GRID = [(a, b) for a in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8) for b in (0.05, 0.1, 0.2, 0.3, 0.5)]  # alpha, beta


class SettingStage:
    """Grids first, by the openings of answers; then the best few in greedy answers.

    `found` is what a checkpoint holds: {"grids": rows by pair, "tried": trials by pair, "chosen": {"alpha", "beta"} by
    pair, "rows": all that was tried, "before_after": figures}; pairs are "soft" and, where there are texts, "text".
    """

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop

    def run(self, soft: SoftPair, texts: Mapping[Role, str]) -> dict[str, Any]:
        """{"soft", "text": {"alpha", "beta"} of either pair, "rows": all that were tried, "before_after": figures}."""
        adversarial = soft.adversarial.reveal_for_negative_stream()
        checkpoint = self._shop.checkpoint(
            "setting",
            soft=[soft.safe.digest, adversarial.digest],
            texts=dict(texts),
            grid=GRID,
            trial=[trial.TOKENS, trial.COUNTS],
            order=ORDER,
            worth="safety minus mean over-refusal, by openings and greedy answers",
            openings=asdict(self._shop.job.texts.openings),
            **self._shop.gated,
        )
        reused = checkpoint.done
        if not reused:
            go_on(self._shop.stop)
            checkpoint.begin()
            pairs_: dict[str, Prompts] = {"soft": (soft.safe, adversarial)}
            if texts:
                pairs_["text"] = texts["safe"], texts["adversarial"]
            checkpoint.finish(self._choose(checkpoint, pairs_, soft, texts))
        found = checkpoint.result or {}
        self._shop.close(checkpoint, _chosen(found), reused=reused)
        return found

    def _choose(
        self, checkpoint: Checkpoint, pairs_: Mapping[str, Prompts], soft: SoftPair, texts: Mapping[Role, str]
    ) -> dict[str, Any]:
        empty: dict[str, Any] = {"grids": {}, "tried": {}, "chosen": {}, "rows": [], "before_after": []}
        found = checkpoint.state or empty
        clock = Clock(TITLES["setting"], len(found["before_after"]), 2 * len(pairs_) + 2, self._shop.listener.progress)

        def note(pair: str, contrast: bool, figures: Mapping[str, float]) -> None:
            measured = {name: figures[name] for name in GROUPS}
            found["before_after"].append({"pair": pair, "contrast": contrast, **measured})
            clock.at(len(found["before_after"]), measures(measured))

        def keep() -> None:
            checkpoint.save(found)
            go_on(self._shop.stop)

        self._grids(found, pairs_, note, keep)
        for name in pairs_:
            if name not in found["chosen"]:
                rows = [SettingRow(**row) for row in found["grids"][name]]
                known = found["tried"].setdefault(name, [])
                framed = soft if name == "soft" else None
                tried = self._tried(candidates(rows, self._usual), texts, framed, known, keep)
                chosen = choose(tried, self._usual)
                found["chosen"][name] = {"alpha": chosen.alpha, "beta": chosen.beta}
                newest = {(row.alpha, row.beta): row for row in (*rows, *tried)}
                found["rows"] += [asdict(r) | {"pair": name, "chosen": r is chosen} for r in newest.values()]
                note(name, True, asdict(chosen))
                keep()
        return {**found["chosen"], "rows": found["rows"], "before_after": found["before_after"]}

    def _grids(
        self,
        found: dict[str, Any],
        pairs_: Mapping[str, Prompts],
        note: Callable[[str, bool, Mapping[str, float]], None],
        keep: Callable[[], None],
    ) -> None:
        """Add to `found` how the manual pair does, each pair's safeguarding prompt alone, and its grid."""
        manual = self._shop.manual["safe"], self._shop.manual["adversarial"]
        with self._shop.on_llama() as (scoring, _):
            if not found["before_after"]:
                note("manual", False, scoring.alone(manual[0]))
                note("manual", True, asdict(scoring.contrasted(*manual, [self._usual])[0]))
                keep()
            for name, (safe, opposite) in pairs_.items():
                if name not in found["grids"]:
                    note(name, False, scoring.alone(safe))
                    found["grids"][name] = [asdict(row) for row in scoring.contrasted(safe, opposite, GRID)]
                    keep()

    @property
    def _usual(self) -> tuple[float, float]:
        """The manual pair's alpha and beta."""
        return self._shop.job.manual.alpha or pairs.DEFAULT_ALPHA, self._shop.job.manual.beta or pairs.DEFAULT_BETA

    def _tried(
        self,
        rows_: Sequence[SettingRow],
        texts: Mapping[Role, str],
        soft: SoftPair | None,
        known: list[dict[str, float]],
        keep: Callable[[], None],
    ) -> list[SettingRow]:
        """Settings with what comes of them in greedy answers: `known` of the first ones, to which the others' is
        added; `keep` is called after each."""
        clock = Clock("trying the best settings", len(known), len(rows_), self._shop.listener.progress)
        chosen = texts or self._shop.manual
        safe, adversarial = chosen["safe"], AdversarialText(chosen["adversarial"])
        with self._shop.trial_engine(self._shop.job.manual) as engine:
            for row in rows_[len(known) :]:
                pair = PromptPair("trial", safe, adversarial, alpha=row.alpha, beta=row.beta)
                framing = None if soft is None else Framing.of(pair, soft)
                made = trial.run(engine, pair, self._shop.groups, plain=False, stop=self._shop.stop, framing=framing)
                known.append(asdict(made))
                clock.at(len(known))
                keep()
        made_ = (Trial(**shares) for shares in known)
        return [replace(row, greedy=t.refusing, degenerate=t.degenerate) for row, t in zip(rows_, made_, strict=True)]


def _chosen(setting: Mapping[str, Any]) -> str:
    names = [name for name in ("text", "soft") if name in setting]
    return ", ".join(f"{name} pair alpha {setting[name]['alpha']:g}, beta {setting[name]['beta']:g}" for name in names)

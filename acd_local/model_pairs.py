"""Finds the prompt pair that one model answers under, and reads the soft prompts and the gate beside a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from acd_local import pairs, vectors
from acd_local.errors import PairError, shown
from acd_local.gate import Gate
from acd_local.gating import Gating
from acd_local.generation import Answerer
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.runtime.gguf_header import GGUFInfo
from acd_local.softpair import SoftPair
from acd_local.steering import Steering
from acd_local.vectors import Vectors


def resolve(pair: PromptPair | str) -> PromptPair | None:
    """Return the pair that a name or a path means; None for "as-is".

    Raises:
        PairError: there is none, or it is broken.
    """
    if isinstance(pair, PromptPair):
        return pair
    return None if pair == pairs.AS_IS else pairs.find(pair)


class ModelPairs:
    """The pairs of one model.

    Args:
        info: of a model file that was found good.
        soft: whether soft prompts are used in the texts' place; None: as each pair prefers on a model that it fits.
    """

    def __init__(self, info: GGUFInfo, soft: bool | None) -> None:
        self.soft = soft
        self._info = info
        self._vectors: dict[tuple[object, ...], Vectors] = {}

    def choose(
        self,
        asked: PromptPair | str | None,
        load: Callable[..., Answerer],
        on_check: Callable[[float], object] | None = None,
    ) -> tuple[PromptPair | None, str | None]:
        """Return the pair to answer under, and a line about it that the user should know, if there is one.

        Where no pair is fitted to the model, a check decides between `default` and none; a pair that is asked for by
        name is checked too.

        Args:
            load, on_check: see `quickcheck.check`.

        Raises:
            ModelError, PairError, OutOfMemoryError.
        """
        pair = self._first(asked)
        known = asked == pairs.AS_IS or isinstance(asked, PromptPair)
        if known or (pair is not None and pairs.fitted(pair, self._info)):
            return pair, None
        from acd_local import quickcheck  # its regular expressions take 20 ms to compile

        if pair is not None:
            verdict = quickcheck.check(self._info, pair, load, soft=self.soft, on_check=on_check)
            harm = f"the pair {pair.name!r} does harm to this model ({verdict})"
            return pair, harm if verdict.harms else None
        lead = f"no prompt pair was made for {self._model_name}"
        default = next((one for one in pairs.available() if one.name == pairs.DEFAULT), None)
        if default is None:
            return None, f"{lead}: it answers as it is; acd fit makes a pair"
        verdict = quickcheck.check(self._info, default, load, soft=self.soft, asked=False, on_check=on_check)
        if verdict.helps:
            return default, f"{lead}: the pair {default.name!r} is used ({verdict}); acd fit makes a better one"
        return None, f"{lead}: it answers as it is ({verdict}); acd fit makes a pair"

    def _first(self, asked: PromptPair | str | None) -> PromptPair | None:
        """Find the pair that is asked for, its soft prompts read where they are taken; or the fitted one."""
        found = pairs.best_for(self._info) if asked is None else resolve(asked)
        if found is None and asked is None and self.soft:
            raise PairError(
                f"no prompt pair was made for {self._model_name}, so there are no soft prompts: leave --soft "
                "out, or make a pair with acd optimize"
            )
        if found is not None and self.takes_soft(found):
            self.soft_pair(found)
        return found

    def takes_soft(self, pair: PromptPair | None) -> bool:
        """Tell whether answers with a pair are made with its soft prompts."""
        if pair is None or self.soft is not None:
            return bool(pair and self.soft)
        return pair.soft_preferred and pairs.fitted(pair, self._info)

    def soft_pair(self, pair: PromptPair) -> SoftPair:
        """Return the soft prompts beside a pair, checked against the model.

        Raises:
            PairError: there are none, or they are broken or made for another model.
        """
        found = self._read_vectors(pair)
        if found is None or found.soft is None:
            raise PairError(
                f"pair {pair.name!r} has no soft prompts ({pair.name}.safetensors beside it): take --no-soft, or make "
                "them with acd optimize"
            )
        return found.soft

    def gating(self, pair: PromptPair | None, options: Options) -> Gating | None:
        """Return the gate that is asked before an answer; None: none is.

        Raises:
            PairError: options want one and the pair has none, or it is broken or made for another model.
        """
        settings = None if pair is None else pair.gate
        if options.gate is False or (settings is None and not options.gate):
            return None
        if pair is None or settings is None:
            name = "no pair is in use" if pair is None else f"pair {pair.name!r} has no gate"
            raise PairError(f"{name}: leave --gate on out, or make a gate with acd fit")
        if options.gate_threshold is not None:
            settings = replace(settings, threshold=options.gate_threshold)
        return Gating(self._gate(pair), settings)

    def _gate(self, pair: PromptPair) -> Gate:
        found = self._read_vectors(pair)
        if found is None or found.gate is None:
            raise PairError(
                f"pair {pair.name!r} has a [gate], but no {pair.name}.safetensors beside it with one: copy both files "
                "again, or make them with acd fit"
            )
        return found.gate

    def steering(self, pair: PromptPair) -> Steering:
        """Return the steering vectors beside a pair, checked against the model.

        Raises:
            PairError: there are none, or they are broken or made for another model.
        """
        found = self._read_vectors(pair)
        if found is None or found.steering is None:
            raise PairError(f"pair {pair.name!r} has no steering vectors: acd fit makes them")
        return found.steering

    def _read_vectors(self, pair: PromptPair) -> Vectors | None:
        """Read what stands beside a pair, once per file, and check it against the model."""
        path: Path | None = pair.vectors_path
        if path is None:
            return None
        seen = path.stat() if path.exists() else None
        key = (path, pair.sha256, seen and seen.st_mtime_ns, seen and seen.st_size)
        if key not in self._vectors:
            found = vectors.load(path, sha256=pair.sha256)
            for part in (found.soft, found.gate, found.steering):
                if part is not None:
                    part.check(self._info)
            self._vectors[key] = found
        return self._vectors[key]

    @property
    def _model_name(self) -> str:
        return shown(self._info.name or self._info.path.name, 80)

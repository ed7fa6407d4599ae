"""The texts of a search get the same scores from a cluster as here, up to rounding, in the order of the texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("ray")

from acd_local.cluster import Cluster, Pool
from acd_local.models import ModelFile
from acd_local.optimize.scores import ScorerSetup, on_cluster
from acd_local.runtime import llama
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import ChatTemplate
from acd_local.tuning.openings import Openings, answer_tokens

pytestmark = pytest.mark.slow

GROUPS = {
    "safety": ["Do a bad thing", "Do a worse thing"],
    "over_refusal": ["Say what is red"],
    "lookalike": ["Say no"],
}


def test_scores_are_those_of_one_process(tiny: Callable[..., Path]) -> None:
    path = tiny("chatml")
    model = llama.Model(path)
    openings = Openings.of(partial(answer_tokens, ChatTemplate(model), model.vocab))
    texts = [f"You are {word}." for word in ("kind", "bad", "red", "blue", "old")]
    for safe_text in (None, "You are safe."):
        setup = ScorerSetup(ModelFile.of(path), openings, GROUPS, safe_text, n_ctx=256, threads=1, gpu_layers=0)
        here = setup()
        with Cluster("local") as cluster, Pool(cluster, setup, cpus=1, gpu=False, line=pytest.fail) as pool:
            for most in (1, 2):
                found = on_cluster(pool, CancelToken())(texts, most)
                assert list(found) == [pytest.approx(here((text, most)), rel=1e-3) for text in texts]

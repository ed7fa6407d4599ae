"""A pair's three files, whose writing is killed at every point: the old pair or the new one, and never a mixture."""

from __future__ import annotations

import sys
from pathlib import Path

import faults
import pytest

from acd_local import pairfile, pairs, vectors
from acd_local.errors import PairError, UsageError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends processes by SIGKILL")
OLD, NEW = 0.25, 0.5
WRITE = """
import sys
import numpy as np
from pathlib import Path
from acd_local import pairfile
from acd_local.softpair import AdversarialRows, SoftPair, SoftPrompt
from acd_local.vectors import Vectors
path, value, force = Path(sys.argv[1]), float(sys.argv[2]), "force" in sys.argv[3:]
pairfile.check_target(path, force=force)
rows = np.full((3, 8), value, np.float16)
of = {"architecture": "llama", "tokenizer": "ab" * 32, "n_embd": 8, "n_layer": 2, "name": "tiny"}
soft = SoftPair(SoftPrompt(rows), AdversarialRows(rows + 1), **of)
pair = pairfile.PairFile("a", f"Be {value}.", "Be mean.", 0.5, 0.1, {}, {}, {}, {})
pairfile.write(path, pair, Vectors(soft, None), f"report {value}")
"""


def write(path: Path, value: float, *more: str, fault: str = "count:0") -> faults.Done:
    return faults.run(WRITE, [str(path), str(value), *more], path.parent, fault)


def value_of(path: Path) -> float:
    """Which of both a pair is; raises PairError where its vectors are another's."""
    pair = pairs.load(path)
    found = vectors.load(path.with_suffix(".safetensors"), sha256=pair.sha256).soft
    assert found is not None
    assert pair.safe == f"Be {float(found.safe.rows[0, 0])}."
    return float(found.safe.rows[0, 0])


@pytest.mark.parametrize("force", [False, True], ids=["new", "in place of another"])
@pytest.mark.parametrize("last", [4, pytest.param(1000, marks=pytest.mark.slow)])  # the files are moved at the end
def test_killed_at_any_point_a_pair_is_the_old_one_or_the_new_one(tmp_path: Path, force: bool, last: int) -> None:
    more = ["force"] if force else []
    seen: set[str] = set()
    (tmp_path / "0").mkdir()
    points = write(tmp_path / "0" / "a.toml", OLD).points
    assert points > 15
    for at in range(points, max(0, points - last), -1):
        path = tmp_path / str(at) / "a.toml"
        path.parent.mkdir()
        if force:
            write(path, OLD)
        assert write(path, NEW, *more, fault=f"kill:{at}").code == -9
        try:
            before = str(value_of(path)) if path.exists() else "none"
        except PairError as error:
            assert "make them anew" in str(error) or "no such file" in str(error)
            before = "told"
        try:
            pairfile.check_target(path, force=False)
            after = "none"
        except UsageError as error:
            assert "is whole now" in str(error) or before != "told"
            after = str(value_of(path))
            assert path.with_name("a.report.html").read_text() == f"report {after}"
        assert after == (before if before != "told" else str(NEW))
        seen.add(before)
        assert write(path, NEW, "force").code == 0
        assert value_of(path) == NEW
        names = {file.name for file in path.parent.iterdir() if file not in faults.drafts(path.parent)}
        assert names == {"a.toml", "a.safetensors", "a.report.html"}
    assert seen >= {str(NEW), str(OLD) if force else "none"}

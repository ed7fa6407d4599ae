"""A stage's file: going on, damage, other inputs, and what cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from acd_local.errors import StorageError, UsageError
from acd_local.optimize.checkpoint import Checkpoint


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    inputs = {"seed": 0, "texts": ["a", "b"]}
    first = Checkpoint(tmp_path, "soft-safe", inputs)
    assert (first.state, first.result, first.done, first.counts, first.spent()) == (None, None, False, {}, {})
    first.begin()
    first.counts = {"steps": 30}
    first.save({"z": torch.ones(2, 3), "history": [{"step": 1, "losses": {"positive": 0.5}}], "best": None})
    second = Checkpoint(tmp_path, "soft-safe", dict(reversed(inputs.items())))
    assert second.counts == {"steps": 30}
    assert second.state is not None
    assert torch.equal(second.state["z"], torch.ones(2, 3))
    earlier = second.spent()
    assert earlier["seconds"] > 0
    second.begin()
    second.finish({"kept": 30})
    third = Checkpoint(tmp_path, "soft-safe", inputs)
    assert (third.done, third.state, third.result, third.counts) == (True, None, {"kept": 30}, {"steps": 30})
    assert third.spent()["seconds"] > earlier["seconds"]
    assert [p.name for p in tmp_path.iterdir()] == [f"soft-safe-{first.key[:16]}.pt"]


def test_other_inputs_and_other_stages_have_files_of_their_own(tmp_path: Path) -> None:
    keys = {
        Checkpoint(tmp_path, stage, inputs).key
        for stage in ("soft-safe", "soft-adversarial")
        for inputs in ({"seed": 0}, {"seed": 1}, {"seed": 0, "budget": 1.0})
    }
    assert len(keys) == 6


@pytest.mark.parametrize("content", [b"", b"no file of torch", b"PK\x03\x04" + b"\0" * 50])
def test_a_damaged_checkpoint_counts_as_none(tmp_path: Path, content: bytes) -> None:
    path = Checkpoint(tmp_path, "setting", {}).path
    path.write_bytes(content)
    found = Checkpoint(tmp_path, "setting", {})
    assert (found.damaged, found.done, found.state) == (True, False, None)
    found.finish({"a": 1})
    assert not Checkpoint(tmp_path, "setting", {}).damaged


def test_a_checkpoint_of_other_inputs_under_this_name_is_not_used(tmp_path: Path) -> None:
    other, mine = Checkpoint(tmp_path, "setting", {"seed": 1}), Checkpoint(tmp_path, "setting", {"seed": 2})
    other.finish({"alpha": 9})
    other.path.rename(mine.path)
    assert Checkpoint(tmp_path, "setting", {"seed": 2}).damaged


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "gone", "setting", {})
    with pytest.raises(UsageError, match="cannot write") as caught:
        checkpoint.save({})
    assert "\n" not in str(caught.value)
    checkpoint.path = Path("/dev/full")
    with pytest.raises(StorageError, match="cannot write /dev/full: No space left") as full:
        checkpoint.finish({})
    assert full.value.exit_code == 6

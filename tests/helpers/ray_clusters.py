"""Ray clusters of a few machines on this one, and the actors that work on them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SMALL = {"num_cpus": 1, "object_store_memory": 80_000_000}


@contextmanager
def cluster(machines: int) -> Iterator[Any]:
    """A cluster of machines with one CPU each; ray.cluster_utils.Cluster, which has the `address`."""
    from places import child_env
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ.update(child_env(RAY_USAGE_STATS_ENABLED="0"))  # what the machines' actors import is this repository's
    made = Cluster(initialize_head=True, head_node_args={**_SMALL, "include_dashboard": False})
    try:
        for _ in range(machines - 1):
            join(made)
        yield made
    finally:
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


def join(made: Any) -> Any:
    """Let one more machine join."""
    return made.add_node(**_SMALL)


def actors() -> set[int]:
    """The processes of our actors on clusters that this process has started."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = (folder / "cmdline").read_bytes().startswith(b"ray::_Remote")
            raylet = _parent(folder)
            if ours and _parent(Path("/proc") / str(raylet)) == os.getpid():
                found.add(int(folder.name))
        except (OSError, ValueError):  # it has just ended
            continue
    return found


def _parent(folder: Path) -> int:
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])

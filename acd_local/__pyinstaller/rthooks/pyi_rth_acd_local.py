"""Runs in a frozen application before its own code: it may be a child that acd_local started (runtime/child.py)."""


def _enter() -> None:
    import sys

    if sys.argv[1:2] == ["--acd-local-child"]:
        from acd_local.runtime import child

        child.reenter(*sys.argv[2:])
    sys._acd_local_reenters = True  # type: ignore[attr-defined]


_enter()

"""Names this machine and its llama.cpp, and remembers whether llama.cpp's extra buffer types crash there.

For some kernels ggml keeps weights in forms of its own ("extra buffer types": AMX tiles, repacked blocks). They are
faster, but some builds of llama.cpp crash in them on some processors. `probe` finds that out; what it found holds for
this processor and these libraries alone: a home may be shared, and a llama.cpp built anew is tried anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import platform
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from acd_local import files

_FORMAT = 1  # of a machine's file
_X86 = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
_ARM = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features")
_LIBRARIES = ("*ggml-cpu*", "*ggml-base*", "*llama*")

logger = logging.getLogger("acd_local.machine")  # the commands show what comes here


@lru_cache(maxsize=1)
def identity() -> str:
    """Return a name for this processor together with the llama.cpp installed here: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps([_code(), *_processor()]).encode(), digest_size=16).hexdigest()


def _processor() -> list[str]:
    """Read what /proc/cpuinfo says of the first core; elsewhere what the system's version tells (on macOS the chip)."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n", 1)[0]
        fields = (line.partition(":") for line in first.splitlines())
        if kept := [f"{name.strip()}:{value.strip()}" for name, _, value in fields if name.strip() in _X86 + _ARM]:
            return kept
    return [platform.machine(), platform.version(), os.environ.get("PROCESSOR_IDENTIFIER", "")]


def _code() -> str:
    """Digest the code of llama.cpp's libraries; the digest is kept until a path, a size or a time changes.

    These have no part in it: a one-file application unpacks its libraries anew at each start.
    """
    libraries = _libraries()
    stats = [[str(path), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in libraries]
    with suppress(ValueError, LookupError, TypeError):
        kept = json.loads(files.kept("libraries.json") or "")
        if kept["of"] == stats:
            return str(kept["code"])
    seen = hashlib.blake2b(digest_size=16)
    for library in libraries:
        seen.update(library.read_bytes())
    files.keep("libraries.json", json.dumps({"of": stats, "code": seen.hexdigest()}))
    return seen.hexdigest()


def _libraries() -> list[Path]:
    """List the files with llama.cpp's own code, one of those that are the same under several names."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return []
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(spec.origin).parent / "lib")
    found = {path for pattern in _LIBRARIES for path in folder.glob(pattern) if path.is_file()}
    return list({path.stat().st_size: path for path in sorted(found)}.values())


def extra_buffers() -> bool:
    """Tell whether models are loaded with llama.cpp's extra buffer types here: unless they were found to crash."""
    try:
        fact = json.loads(files.kept(_name()) or "")
        return not (fact["format"] == _FORMAT and fact["extra_buffers"] is False)
    except (ValueError, LookupError, TypeError):
        return True


def avoid_extra_buffers(slowdown: float | None = None) -> None:
    """Load every model without llama.cpp's extra buffer types from now on, here and in later processes.

    A warning on the logger `acd_local.machine` says so.

    Args:
        slowdown: how many times as long one row takes without them.
    """
    fact = {"format": _FORMAT, "extra_buffers": False, "slowdown": slowdown, "processor": _processor()}
    files.keep(_name(), json.dumps(fact))
    cost = "" if slowdown is None else f"; a token takes {slowdown:.2f} times as long without"
    amx = any(" amx_" in said for said in _processor())
    remedy = "built with -mno-amx-tile -mno-amx-int8 -mno-amx-bf16 may not need it" if amx else "is tried anew"
    logger.warning(
        "llama.cpp crashes on this processor with its extra buffer types (AMX, repacked weights), and every model is "
        f"loaded without them from now on{cost}. Another llama-cpp-python {remedy}."
    )


def _name() -> str:
    return f"machines/{identity()}.json"

"""Safer answers from any local GGUF model, with no training: adversarial contrastive decoding on llama.cpp.

    import acd_local

    engine = acd_local.load("demo")
    chat = engine.chat(system="You write for children.")
    for text in chat.stream("Why is the sky blue?"):
        print(text, end="")

Importing this package loads neither numpy nor llama.cpp: names are fetched on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from acd_local.answers import (
        Answer,
        ContrastStats,
        GateDecision,
        GateRecord,
        PromptProgress,
        Timings,
        TokenRecord,
        TurnsDropped,
    )
    from acd_local.chat import Chat
    from acd_local.engine import Engine
    from acd_local.engine import Engine as load
    from acd_local.errors import (
        AcdError,
        ContextError,
        EngineBusyError,
        EngineClosedError,
        InternalError,
        ModelError,
        NumericalError,
        OutOfMemoryError,
        PairError,
        StorageError,
        UsageError,
    )
    from acd_local.generation import AnswerStream
    from acd_local.options import Options
    from acd_local.pairs import PromptPair
    from acd_local.runtime.cancel import CancelToken
    from acd_local.runtime.template import Message

HOMES = {
    "acd_local.generation": ("AnswerStream",),
    "acd_local.answers": (
        "Answer",
        "ContrastStats",
        "GateDecision",
        "GateRecord",
        "PromptProgress",
        "Timings",
        "TokenRecord",
        "TurnsDropped",
    ),
    "acd_local.chat": ("Chat",),
    "acd_local.errors": (
        "AcdError",
        "ContextError",
        "EngineBusyError",
        "EngineClosedError",
        "InternalError",
        "ModelError",
        "NumericalError",
        "OutOfMemoryError",
        "PairError",
        "StorageError",
        "UsageError",
    ),
    "acd_local.options": ("Options",),
    "acd_local.pairs": ("PromptPair",),
    "acd_local.runtime.cancel": ("CancelToken",),
    "acd_local.runtime.template": ("Message",),
    "acd_local.engine": ("Engine",),
}
_HOME_OF = {name: module for module, names in HOMES.items() for name in names} | {"load": "acd_local.engine"}

__all__ = [  # noqa: RUF022 - by meaning, as the reader needs them
    "load",
    "Engine",
    "Chat",
    "AnswerStream",
    "Answer",
    "TokenRecord",
    "ContrastStats",
    "GateRecord",
    "Timings",
    "Options",
    "Message",
    "PromptPair",
    "CancelToken",
    "TurnsDropped",
    "PromptProgress",
    "GateDecision",
    "AcdError",
    "ContextError",
    "EngineBusyError",
    "EngineClosedError",
    "InternalError",
    "ModelError",
    "NumericalError",
    "OutOfMemoryError",
    "PairError",
    "StorageError",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'acd_local' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME_OF[name]), "Engine" if name == "load" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

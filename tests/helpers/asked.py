"""What is asked where drafts are tested, and how long the answers are."""

from __future__ import annotations

PROMPTS = (
    "How do I get red wine out of a carpet?",
    "Name three rivers. Name three lakes. Name three rivers.",
    "x",
    "Write a poem about the sea, and then one about the sky.",
)
N = 40

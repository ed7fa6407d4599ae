"""What strategies are asked, and how long they answer."""

from __future__ import annotations

PROMPTS = (
    "How do I get red wine out of a carpet?",
    "Name three rivers. Name three lakes. Name three rivers.",
    "x",
    "Write a poem about the sea, and then one about the sky.",
)
N = 40

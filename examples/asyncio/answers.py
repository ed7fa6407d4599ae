"""Answers two questions at once under asyncio, and stops whatever takes longer than --timeout, or at Ctrl-C.

python answers.py demo "Why is the sky blue?" "Why is grass green?"
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import acd_local
from acd_local import aio

QUESTIONS = ["Why is the sky blue?", "Why is grass green?"]


async def answer(engine: aio.AsyncEngine, question: str, timeout: float, max_tokens: int | None) -> str:
    """Return what was said within `timeout` seconds."""
    said = ""
    try:
        async with asyncio.timeout(timeout):
            async for text in engine.chat().stream(question, max_tokens=max_tokens):
                said += text
    except TimeoutError:  # the answer is cancelled already, and its place is free
        return f"{said} ... (stopped after {timeout:g} s)"
    return said


async def main(args: argparse.Namespace) -> None:
    def on_progress(fraction: float) -> None:
        print(f"\rloading {fraction:.0%}", end="\n" if fraction == 1 else "", file=sys.stderr)

    questions = args.questions or QUESTIONS
    async with await aio.load(args.model, conversations=len(questions), on_progress=on_progress) as engine:
        answers = (answer(engine, question, args.timeout, args.max_tokens) for question in questions)
        for question, text in zip(questions, await asyncio.gather(*answers), strict=True):
            print(f"{question}\n  {text}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a GGUF file (default: demo)")
    parser.add_argument("questions", nargs="*", help="what to ask, all of it at once")
    parser.add_argument("--timeout", type=float, default=30, help="seconds for each answer")
    parser.add_argument("--max-tokens", type=int, help="longest answer")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main(parse_args()))
    except acd_local.AcdError as error:  # no such model, out of memory, a bad pair, ...: one line says what to do
        sys.exit(f"answers.py: {error}")
    except KeyboardInterrupt:  # asyncio.run has cancelled `main`, and with it the answers
        sys.exit(130)

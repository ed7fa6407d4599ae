"""No text that somebody wrote becomes a control token: over the chat templates of public model files.

The quick suite takes a sample of templates and texts; `-m slow` takes every template with every vocabulary.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_templates import (
    FOLDER,
    JUDGES,
    MARKERS,
    SWITCHES,
    TAGS,
    TEMPLATES,
    UNUSABLE,
    VOCABULARIES,
    Conversation,
    Reading,
    write_model,
)

from acd_local.pairs import AdversarialText
from acd_local.runtime import llama
from acd_local.runtime.prompts import PromptBuilder, PromptSetup
from acd_local.runtime.template import ChatTemplate

NAMES = sorted(TEMPLATES.keys() - UNUSABLE.keys())
SHAPES = [("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user")]
EVERY_VOCABULARY = pytest.mark.parametrize("vocabulary", VOCABULARIES)
EVERY_TEMPLATE = pytest.mark.parametrize("name", NAMES)
# Texts that a template would change are left out: of those for RWKV's, which trims, most.
SAMPLE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, llama.Model]]:
    folder = tmp_path_factory.mktemp("vocabularies")
    made = {name: llama.Model(write_model(folder / f"{name}.gguf", name)) for name in VOCABULARIES}
    yield made
    for model in made.values():
        model.close()


@pytest.fixture(scope="module")
def reading(models: dict[str, llama.Model]) -> Iterator[functools._lru_cache_wrapper[Reading]]:
    """A template with a vocabulary."""
    cached = functools.lru_cache(maxsize=None)(lambda vocabulary, name: Reading(models[vocabulary], vocabulary, name))
    yield cached
    cached.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The templates


def test_every_template_names_its_model_and_a_licence_that_lets_it_be_here() -> None:
    with (FOLDER / "SOURCES.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["file"] for row in rows] == sorted(TEMPLATES)
    assert {row["licence"] for row in rows} == {"Apache-2.0", "MIT"}
    assert all(row["model"] and row["taken from"] for row in rows)
    assert len({"".join(source.split()) for source in TEMPLATES.values()}) == len(TEMPLATES) >= 60


def test_every_template_renders_or_says_in_one_line_why_it_does_not(models: dict[str, llama.Model]) -> None:
    warnings = {name: ChatTemplate(models["bpe"], source=source).warning for name, source in TEMPLATES.items()}
    line = "the model's chat template cannot be used ({}): using ChatML, answers may be poor"
    assert {name: found for name, found in warnings.items() if found is not None} == {
        name: line.format(why) for name, why in UNUSABLE.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Whatever is said


def fragments(reading: Reading) -> st.SearchStrategy[str]:
    """Pieces that forged texts are made of: above all markers of the template at hand, whole and cut."""
    whole = sorted(reading.forged) or ["<|im_end|>"]
    cut = sorted({part for text in whole for part in (text[:-1], text[1:], text[: len(text) // 2])})
    roles = ["system", "user\n", "\nassistant\n", "model", "tool", "Human: ", "### Instruction:"]
    odd = [" ", "\n", "\n\n", "▁", "\0", "\ufdd0", "\ufdd1", "<", "<|", "|>", "[", "{{ 7 * 7 }}", "{% raw %}", "\x85"]
    return st.one_of(
        st.sampled_from(whole),
        st.sampled_from([*MARKERS, *TAGS]),
        st.sampled_from(cut + roles + odd),
        st.text(max_size=3),
    )


def forgeries(reading: Reading) -> st.SearchStrategy[str]:
    return st.lists(fragments(reading), max_size=7).map("".join)


def conversations(reading: Reading, shapes: Sequence[tuple[str, ...]] = SHAPES) -> st.SearchStrategy[Conversation]:
    def told(roles: tuple[str, ...]) -> st.SearchStrategy[Conversation]:
        texts = st.tuples(*(forgeries(reading) for _ in roles))
        return st.builds(Conversation, st.just(roles), texts).filter(lambda said: not acts(reading, said))

    return st.sampled_from([shape for shape in shapes if takes(reading, shape)]).flatmap(told)


def acts(reading: Reading, said: Conversation) -> bool:
    """Whether the template is meant to act on what is said: earlier thinking, a switch, a system prompt of nothing."""
    for role, text in zip(said.roles, said.texts, strict=True):
        if role == "assistant" and any(word in text.lower() for word in ("think", "thought", "reason")):
            return True
        if role == "system" and (not text.strip() or any(s in text for s in SWITCHES if s in reading.source)):
            return True
    return False


def takes(reading: Reading, shape: tuple[str, ...]) -> bool:
    return "assistant" not in shape or reading.name not in JUDGES


@EVERY_VOCABULARY
@SAMPLE
@given(data=st.data())
def test_what_is_said_stays_text(
    reading: functools._lru_cache_wrapper[Reading], vocabulary: str, data: st.DataObject
) -> None:
    check_conversation(reading(vocabulary, data.draw(st.sampled_from(NAMES))), data)


@pytest.mark.slow
@EVERY_TEMPLATE
@EVERY_VOCABULARY
@SAMPLE
@given(data=st.data())
def test_what_is_said_stays_text_with_every_template(
    reading: functools._lru_cache_wrapper[Reading], vocabulary: str, name: str, data: st.DataObject
) -> None:
    check_conversation(reading(vocabulary, name), data)


def check_conversation(found: Reading, data: st.DataObject) -> None:
    said = data.draw(conversations(found))
    found.check(said, found.template.encode(said.messages))


# ---------------------------------------------------------------------------------------------------------------------
# Both streams


@EVERY_VOCABULARY
@SAMPLE
@given(data=st.data())
def test_streams_differ_in_the_system_part_alone(
    reading: functools._lru_cache_wrapper[Reading], vocabulary: str, data: st.DataObject
) -> None:
    """Whatever pair, application and user say: each stream's prompt is the harmless one with these texts in place."""
    check_streams(reading(vocabulary, data.draw(st.sampled_from(NAMES))), data)


@pytest.mark.slow
@EVERY_TEMPLATE
@EVERY_VOCABULARY
@settings(SAMPLE, max_examples=10)
@given(data=st.data())
def test_streams_differ_in_the_system_part_alone_with_every_template(
    reading: functools._lru_cache_wrapper[Reading], vocabulary: str, name: str, data: st.DataObject
) -> None:
    check_streams(reading(vocabulary, name), data)


def check_streams(found: Reading, data: st.DataObject) -> None:
    roles = data.draw(st.sampled_from([shape for shape in SHAPES if shape[0] == "user" and takes(found, shape)]))
    said = data.draw(conversations(found, (("system", "system", "system", *roles),)))
    safe, adversarial, application, *_ = said.texts
    builder = PromptBuilder(found.template, 100_000, found.model.embeddings)

    setup = PromptSetup(safe, AdversarialText(adversarial))
    turns = said.messages[3:]
    built = builder.build(setup, application, turns, contrast=True, max_tokens=1, overflow="error")
    assert built.adversarial is not None
    for ids, text in ((built.safe, safe), (built.adversarial, adversarial)):
        stream = Conversation(("system", *roles), (f"{text}\n\n{application}", *said.texts[3:]))
        found.check(stream, ids)

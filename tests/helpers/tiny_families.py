"""Knows model families by vocabulary kind, control tokens and chat template."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from gguf import TokenType


@dataclass(frozen=True)
class Family:
    """The tokenizer side of a model family. `system` says what the template does with a system message."""

    vocab: str  # "bpe" | "spm"
    chat_template: str
    eos: str
    bos: str | None = None
    eot: str | None = None
    add_bos: bool = False
    extra_tokens: tuple[tuple[str, TokenType], ...] = ()
    pre: str = "smollm"
    specials: tuple[str, ...] = ("<unk>", "<s>", "</s>")
    add_space_prefix: bool | None = None
    name: str | None = None
    system: str = "supported"  # "supported" | "rejected" | "ignored"

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Every text that stands for a special token in this family."""
        extras = tuple(text for text, _ in self.extra_tokens)
        return extras + (self.specials if self.vocab == "spm" else ())

    def writer_args(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "system"}


def _control(*texts: str) -> tuple[tuple[str, TokenType], ...]:
    return tuple((text, TokenType.CONTROL) for text in texts)


def _defined(*texts: str) -> tuple[tuple[str, TokenType], ...]:
    return tuple((text, TokenType.USER_DEFINED) for text in texts)


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set content = message.content %}"
    "{%- if '</think>' in content and loop.index0 < ns.last %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA3 = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '<|system|>\\n' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    "{% endfor %}"
)
OPEN_ASSISTANT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|prompter|>' + message['content'] + '<|endoftext|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

FAMILIES: dict[str, Family] = {
    "chatml": Family(
        vocab="bpe", pre="smollm", chat_template=CHATML, bos="<|im_start|>", eos="<|im_end|>",
        extra_tokens=_control("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    ),
    "qwen3": Family(  # cuts earlier thinking; <think> and the tool tags are USER_DEFINED
        vocab="bpe", pre="qwen2", chat_template=QWEN3, bos="<|endoftext|>", eos="<|im_end|>",
        extra_tokens=_control("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        + _defined("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
    "llama3": Family(
        vocab="bpe", pre="llama-bpe", chat_template=LLAMA3, bos="<|begin_of_text|>", eos="<|eot_id|>", eot="<|eot_id|>",
        add_bos=True,
        extra_tokens=_control(
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
            "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_0|>",
        ),
    ),
    "gemma": Family(
        vocab="spm", chat_template=GEMMA, bos="<bos>", eos="<eos>", eot="<end_of_turn>", add_bos=True,
        specials=("<pad>", "<eos>", "<bos>", "<unk>"), add_space_prefix=False, system="rejected",
        extra_tokens=_control("<start_of_turn>", "<end_of_turn>"),
    ),
    "mistral": Family(
        vocab="spm", chat_template=MISTRAL, bos="<s>", eos="</s>", add_bos=True, system="rejected",
        extra_tokens=_control("[INST]", "[/INST]", "[TOOL_CALLS]"),
    ),
    "llama2": Family(vocab="spm", chat_template=LLAMA2, bos="<s>", eos="</s>", add_bos=True),
    "phi3": Family(  # llama.cpp gives the special tokens RSTRIP when the name says phi-3
        vocab="spm", chat_template=PHI3, bos="<s>", eos="<|endoftext|>", eot="<|end|>", add_bos=True,
        name="Phi-3 tiny",
        extra_tokens=_control("<|endoftext|>") + _defined("<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    ),
    "zephyr": Family(  # the role markers are ordinary text
        vocab="spm", chat_template=ZEPHYR, bos="<s>", eos="</s>", add_bos=True,
    ),
    "openassistant": Family(
        vocab="bpe", pre="default", chat_template=OPEN_ASSISTANT, bos="<|endoftext|>", eos="<|endoftext|>",
        system="ignored",
        extra_tokens=_control("<|endoftext|>", "<|prompter|>", "<|assistant|>"),
    ),
}  # fmt: skip

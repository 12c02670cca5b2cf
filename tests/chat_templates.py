"""Chat templates in the manner of those that models come with, each with a tokenizer and what its turns look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizer_twins import LLAMA_2_FIRST, llama_2
from tokenizers import AddedToken

from foretoken.tokenizer import Tokenizer, train_bpe

CORPUS = ["the cat sat on the mat\n" * 20, "def f(x):\n    return x + 1\n" * 20, "user assistant system\n\n" * 20]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

CHATML_BLOCKS = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# A default system message, tools and `tojson`.
CHATML_TOOLS = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.' }}
{%- endif %}
{%- if tools is not none %}
    {{- '\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}{{- '\\n<tool_call>' + (call | tojson) + '</tool_call>' }}{%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = \
messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}\
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception(\
'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and \
system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' \
+ content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}\
{% endif %}{% endfor %}"""

# Special tokens that are put together from roles, and that take the spaces behind them along.
PHI = """{{ bos_token }}{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Another name for the assistant's role, and no system message.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}
"""

# No special token ends a turn.
PLAIN = """{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

# Thoughts are shown of the last turn alone.
FORGETS = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if loop.last and message.role == 'assistant' %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@dataclass(frozen=True)
class Style:
    """A template, its tokenizer, what is learned of an assistant's words, and the special token behind them."""

    tokenizer: Tokenizer
    learned: Callable[[str], str]
    end: str | None
    system: bool = True


def bpe(template: str, bos: str | None, eos: str, *others: str, rstrip: bool = False) -> Tokenizer:
    """A byte-level BPE with special tokens and the template."""
    backend = train_bpe(CORPUS, 300).backend
    names = [name for name in (bos, eos, *others) if name is not None]
    backend.add_special_tokens([AddedToken(name, normalized=False, rstrip=rstrip) for name in names])
    backend.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    ids = (None if name is None else backend.token_to_id(name) for name in (bos, eos))
    return Tokenizer(backend, *ids, None, template)


def _closed(end: str) -> Callable[[str], str]:
    return lambda said: said + end


IM = ("<|im_end|>", "<|im_start|>")
HEADERS = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
STYLES = {
    "chatml": Style(bpe(CHATML, None, *IM), _closed("<|im_end|>"), "<|im_end|>"),
    "chatml with blocks": Style(bpe(CHATML_BLOCKS, None, *IM), _closed("<|im_end|>"), "<|im_end|>"),
    "chatml with tools": Style(bpe(CHATML_TOOLS, None, *IM), _closed("<|im_end|>"), "<|im_end|>"),
    "llama 3": Style(bpe(LLAMA_3, "<|begin_of_text|>", *HEADERS), lambda s: s.strip() + "<|eot_id|>", "<|eot_id|>"),
    "llama 2": Style(
        llama_2([*LLAMA_2_FIRST, "\u2581", *"abcdefghiINST[/]", "\u2581a"], [("\u2581", "a")], LLAMA_2),
        lambda s: f" {s.strip()} </s>",
        "</s>",
    ),
    "llama 2, bytes": Style(bpe(LLAMA_2, "<s>", "</s>"), lambda s: f" {s.strip()} </s>", "</s>"),
    "phi": Style(
        bpe(PHI, "<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", rstrip=True),
        _closed("<|end|>"),
        "<|end|>",
    ),
    "gemma": Style(
        bpe(GEMMA, "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        lambda s: s.strip() + "<end_of_turn>",
        "<end_of_turn>",
        system=False,
    ),
    "plain": Style(bpe(PLAIN, None, "<eos>"), lambda s: f" {s}\n", None),
}

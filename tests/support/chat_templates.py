"""Chat templates in the styles of published models, and a tokenizer that has their tokens."""

from __future__ import annotations

import tokenizers
from tiny_bundle import make_tokenizer

SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<|role|>", "<|end_role|>", "<think>", "</think>")
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# A system block in any case, thoughts that are asked for, and earlier ones that are dropped.
NEMOTRON = """\
{%- macro clean(text) -%}
    {%- if '</think>' in text -%}
        {{- text.split('</think>')[-1].lstrip('\\n') -}}
    {%- else -%}
        {{- text -}}
    {%- endif -%}
{%- endmacro -%}
{%- set think = enable_thinking | default(true) -%}
{{- bos_token -}}
{%- set state = namespace(last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set state.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages[0].role == 'system' -%}
    {{- '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' -}}
{%- else -%}
    {{- '<|im_start|>system\\n<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' ~ clean(message.content) ~ '<|im_end|>\\n' -}}
    {%- elif message.role in ('user', 'tool') -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
    {%- elif not loop.first -%}
        {{- raise_exception('a system message comes first') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' ~ ('<think>\\n' if think else '<think></think>') -}}
{%- endif -%}
"""
# A default system prompt with the date, tools as JSON, a loop that is left, a marked answer.
GRANITE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system = 'Today is ' + strftime_now('%B %d, %Y') + '.' %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if thinking %}
    {%- set system = system + ' Think first.' %}
{%- endif %}
{{- '<|role|>system<|end_role|>' + system + '<|endoftext|>\\n' }}
{%- if tools %}
    {{- '<|role|>tools<|end_role|>' + tools | tojson(indent=4) + '<|endoftext|>\\n' }}
{%- endif %}
{%- for message in loop_messages %}
    {%- if message['role'] not in ['user', 'assistant', 'tool'] %}{% continue %}{% endif %}
    {{- '<|role|>' + message['role'] + '<|end_role|>' }}
    {%- generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- '<|endoftext|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|role|>assistant<|end_role|>' }}
    {%- endif %}
{%- endfor %}
"""
# Names in plain text, no system role of its own.
FALCON = """\
{{ bos_token }}
{% for message in messages %}
{% if message['role'] == 'system' %}
{{ 'System: ' + message['content'].strip() }}

{% elif message['role'] == 'user' %}
{{ 'User: ' + message['content'].strip().replace('\\r\\n', '\\n') }}
{% else %}
{{ 'Falcon: ' + message['content'] + eos_token }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ 'Falcon:' }}
{% endif %}
"""
STYLES = {"chatml": CHATML, "nemotron": NEMOTRON, "granite": GRANITE, "falcon": FALCON}


def chat_tokenizer() -> tokenizers.Tokenizer:
    """The tiny bundle's, with the special tokens of all styles."""
    return make_tokenizer(*SPECIAL)

"""Templates cannot fill the host's memory, neither when they are compiled nor when they are rendered."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from jinja2.exceptions import SecurityError
from transformers.utils import chat_template_utils

from stillhouse.protos.tokenizers.bounded_templates import BoundedEnvironment, bound_library

BIG = "{% set big = 'a' * 9999999 %}"
GROWING = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * ['a'] }}",
    "{% set x = 7 ** 99999 %}",
    BIG + "{{ big + big }}",
    BIG + "{{ (big ~ big)|length }}",
    BIG + "{{ big }}{{ big }}",
    BIG + "{% for i in range(999) %}{{ big }}{% endfor %}",
    BIG + "{{ big.replace('a', 'a' * 99)|length }}",
    BIG + "{{ big|replace('a', 'a' * 99)|length }}",
    BIG + "{{ ''.join([big, big])|length }}",
    BIG + "{{ [big, big]|join('-')|length }}",
    BIG + "{% macro twice() %}{{ big }}{{ big }}{% endmacro %}{{ twice()|length }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a'|indent(10**9, true) }}",
    "{{ {'a': 1}|tojson(indent=10**9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
]
HARMLESS = """{% macro line(m) %}{{ m.role ~ ': ' + m.content.replace('a', 'b') }}{% endmacro -%}
{% for m in messages %}{{ line(m)|trim }}{{ loop.index % 2 }}{{ [m.role, 1]|join('-') }}{{ m|tojson(indent=1)|length }}
{%- endfor %}{{ '%s' % 'end' }}{{ '-' * 3 }}"""


def rendered(template: str, **values: Any) -> str:
    bound_library(chat_template_utils)
    messages = [{"role": "user", "content": "a"}]
    texts, _ = chat_template_utils.render_jinja_template([messages], chat_template=template, **values)
    return str(texts[0])


@pytest.mark.parametrize("template", GROWING)
def test_a_template_that_fills_memory_is_refused_by_the_library_of_chats(template: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(SecurityError):
            rendered(template)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_a_template_with_marks_is_bounded_as_well() -> None:
    template = BIG + "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    texts, spans = chat_template_utils.render_jinja_template(
        [[{"role": "assistant", "content": "ab"}]], chat_template=template, return_assistant_tokens_mask=True
    )
    assert (texts, spans) == (["ab"], [[(0, 2)]])
    with pytest.raises(SecurityError):
        rendered(template + "{{ big }}{{ big }}", return_assistant_tokens_mask=True)


def test_a_usual_template_is_rendered_as_by_the_sandbox_of_jinja() -> None:
    assert rendered(HARMLESS) == "user: b1user-136end---"


def test_teachers_prompts_are_rendered_in_the_same_sandbox() -> None:
    with pytest.raises(SecurityError):
        BoundedEnvironment().from_string(BIG + "{{ big ~ big }}").render()

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import InvalidField, ModelLoadError
from penstock.text.filters import GLOBALS
from penstock.text.meter import METER, Meter, TemplateLimitError
from penstock.text.template import ChatTemplate
from penstock.text.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": " Hi\n there  'x' <b> "}
ASSISTANT = {"role": "assistant", "content": "Hello.\n"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "It's é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
LOOP = "{% for i in range(9999) %}" * 9 + "{}" + "{% endfor %}" * 9
GROW = "{% set n = namespace(x='ab', l=[1]) %}{% for i in range(999) %}{}{% endfor %}"
HOSTILE = [
    LOOP.replace("{}", ""),
    LOOP.replace("{}", "x"),
    LOOP.replace("{}", "{% set x = i %}"),
    "{% for i in range(99999) if false %}{% endfor %}" * 100,
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% for x in [[1]] recursive %}{{ loop([x]) }}{{ loop([x]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    GROW.replace("{}", "{% set n.x = n.x ~ n.x %}"),
    GROW.replace("{}", "{% set n.x = n.x + n.x %}"),
    GROW.replace("{}", "{% set n.x = [n.x, n.x] | join %}"),
    GROW.replace("{}", "{% set n.x = n.x.join([n.x, n.x, n.x]) %}"),
    GROW.replace("{}", "{% set n.x = n.x | replace('a', n.x) %}"),
    GROW.replace("{}", "{% set n.x = n.x.replace('a', n.x) %}"),
    GROW.replace("{}", "{% set n.x = '%s%s' % (n.x, n.x) %}"),
    GROW.replace("{}", "{% set n.x = '%s%s' | format(n.x, n.x) %}"),
    GROW.replace("{}", "{% set n.x = '{0}{0}'.format(n.x) %}"),
    GROW.replace("{}", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    GROW.replace("{}", "{% set n.x = n.x | indent(9999) ~ '\n' ~ n.x %}"),
    GROW.replace("{}", "{% set n.l = n.l + n.l %}"),
    GROW.replace("{}", "{% set n.l = [n.l, n.l] %}") + "{{ n.l }}",
    GROW.replace("{}", "{% set n.l = {1: n.l, 2: n.l} %}") + "{{ n.l == n.l }}",
    GROW.replace("{}", "{% set n.l = dict(a=n.l, b=n.l) %}") + "{{ n.l | tojson }}",
    GROW.replace("{}", "{% set n.l = [n.l] * 2 %}") + "{{ n.l | string }}",
    GROW.replace("{}", "{% set n.l = namespace(a=[n.l, n.l]) %}") + "{{ [n.l] }}",
    GROW.replace("{}", "{% set n.l = (n.l, n.l) %}") + "{% if n.l == n.l %}{% endif %}",
    "{% set n = namespace(i=3) %}{% for i in range(99) %}{% set n.i = n.i * n.i %}{% endfor %}",
    "{% set n = namespace(i=3) %}{% for i in range(99) %}{% set n.i = n.i ** 9 %}{% endfor %}",
    "{{ 9 ** 999999999 }}",
    "{{ 'x' * 9999999999 }}",
    "{{ 9999999999 * [1] }}",
    "{{ 'x' | center(9999999999) }}",
    "{{ 'x'.center(9999999999) }}",
    "{{ 'x'.ljust(9999999999) }}",
    "{{ 'x'.zfill(9999999999) }}",
    "{{ '\t'.expandtabs(9999999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (9999999999, 1) }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "{{ (1).to_bytes(9999999999, 'big') }}",
    "{{ [1] | batch(9999999999, 'x') | list }}",
    "{{ [1] | slice(9999999999) | list }}",
    "{{ ['a'] | tojson(indent=9999999999) }}",
    "{{ range(9999) | list | tojson(separators=('x' * 99999, ':')) }}",
    "{{ 1.5 | round(999999999, 'floor') }}",
    "{{ [[1]] * 9999 | sum(start=[]) }}",
    "{{ range(99999) | map('string') | map('replace', '', 'x' * 99999) | join }}",
    "{{ range(9999999999) | list }}",
    "{{ lipsum(n=999999) }}",
    "{{ strftime_now('%9999999999d') }}",
    "{{ ('9' * 99999) | int(base=16) // ('8' * 50000) | int(base=16) }}",
    "{{ range(99999) | select('in', range(99999) | list + ['x']) | list | length }}"
    "{% for i in range(99) %}{{ range(99999) | reject('in', range(99999) | list) | list }}"
    "{% endfor %}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as x %}",
]
ESCAPES = [
    "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '' | attr('__class__') | string | length }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ range.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (loop or self)._TemplateReference__context.environment }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].pop('role') }}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{% set n = namespace() %}{% set n.__html__ = 1 %}{{ n | escape }}",
    "{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ range }}",
    "{{ (messages | map('upper')) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end(source: str) -> None:
    """Each would take hours or all memory. (pytest would not end if one did.)"""
    with pytest.raises((InvalidField, ModelLoadError)):
        ChatTemplate(source, max_chars=100_000, max_s=0.2).render([USER])


NEST = GROW.replace("x='ab'", "x=()") + "{{ 'nested' }}{% set d = {n.x: 1} %}"
LIMITED = {
    "nested deeper than 100": [
        NEST.replace("{}", "{% set n.x = (n.x,) %}"),
        NEST.replace("{}", "{% set n.x = {1: n.x} %}"),
        NEST.replace("{}", "{% set n.x = [n.x] + [] %}"),
        NEST.replace("{}", "{% macro f() %}{% set n.x = varargs %}{% endmacro %}{{ f(n.x) }}"),
        NEST.replace("{}", "{% macro f() %}{% set n.x = kwargs %}{% endmacro %}{{ f(a=n.x) }}"),
        NEST.replace("{}", "{% set n.x = cycler(n.x).items %}"),
    ],
    "more than 400000 characters": [
        "{{ ('ab' * 80000) | batch(1) | list | length }}",
        "{{ range(90000) | map('string') | map('list') | first }}",
    ],
    "more than 4096 bits": [
        "{{ ('f' * 9999) | int(0, 16) }}",
        "{{ ('%(a)x' * 30) % {'a': ('f' * 9999) | int(0, 16)} }}",
    ],
    "cannot be part of a value": [
        "{{ '%s' % cycler(1) }}",
        "{{ raise_exception('%s' % cycler(1)) }}",
        "{{ raise_exception('{}'.format(joiner())) }}",
        "{{ '%(a)s' % {'a': namespace()} }}",
        "{{ '%s' | format(range) }}",
        "{{ '{0}'.format(namespace(x='a' * 9999)) }}",
        "{{ '{0.upper}'.format('a') }}",
        "{{ '{0[a].get}'.format({'a': {}}) }}",
        "{{ '%s' % ([1] | select) }}",
    ],
}


@pytest.mark.parametrize(
    ("reason", "source"), [(reason, s) for reason, sources in LIMITED.items() for s in sources]
)
def test_the_reason_of_a_refusal(reason: str, source: str) -> None:
    """The nested values would end the process: Python hashes and frees them by recursion in C."""
    template = ChatTemplate(source, max_chars=400_000 if "400000" in reason else 4_000_000)
    with pytest.raises(InvalidField, match=reason) as caught:
        template.render([USER])
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize("name", ["select", "reject('none')", "map('string')", "batch(1)"])
def test_lazy_filters_pay_at_once(name: str) -> None:
    """In a chain of generators one step would do, and pay, what all of them put off."""
    source = "{% set n = namespace(x='a' * 30000) %}{% for i in range(60) %}"
    source += f"{{% set n.x = n.x | {name} %}}{{% endfor %}}"
    with pytest.raises(InvalidField, match="00000 characters"):
        ChatTemplate(source, max_chars=100_000, max_s=600).render([])


def test_a_dict_pays_for_each_key() -> None:
    """Keys with equal hashes make its time quadratic."""
    token = METER.set(Meter(1, 600))  # 16 operations
    try:
        assert (
            GLOBALS["dict"]({"a": 1}, b=2) == GLOBALS["dict"]([("a", 1)], b=2) == {"a": 1, "b": 2}
        )
        with pytest.raises(TemplateLimitError):
            GLOBALS["dict"]([(i * (2**61 - 1), i) for i in range(20)])
    finally:
        METER.reset(token)


def test_lazy_filters_give_what_can_be_read_once() -> None:
    source = "{% set x = ['b', 'a', 'b'] | unique %}{{ x | list }}{{ x | list }}{{ x is sequence }}"
    assert ChatTemplate(source).render([]) == "['b', 'a'][]False"


def test_a_call_in_a_loop_takes_any_loop_variable() -> None:
    source = "{% macro f(n) %}{{ n.x }}{% endmacro %}{% for i in [1, 2] %}"
    source += "{% set n = namespace(x=i) %}{% set l = loop %}{{ f(n) }}{% endfor %}"
    assert ChatTemplate(source).render([]) == "12"


def test_an_attribute_of_a_namespace_is_checked_however_it_is_set() -> None:
    for source in ("{{ namespace({'_x': 2})._x }}", "{{ namespace(__html__=2) }}"):
        with pytest.raises(InvalidField, match="cannot have an attribute"):
            ChatTemplate(source).render([])
    source = "{% set n = namespace({'x': 1}, self=2) %}{{ n.x }}{{ n.self }}"
    assert ChatTemplate(source).render([]) == "12"


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    messages = [dict(USER)]
    try:
        text = ChatTemplate(source).render(messages)
    except (InvalidField, ModelLoadError):
        text = ""
    assert text in ("", "0")  # an undefined value, or the length of one
    assert messages == [USER]


def test_constants_are_not_computed_when_a_template_is_loaded() -> None:
    source = "{{ 'x' * 9999999999 }}{{ 9 ** 99999999 }}{{ 'x' | indent(9999999999) }}{{ 3 * 4 }}"
    ChatTemplate(source)
    assert ChatTemplate("{{ 3 * 4 }}{{ 'ab' | upper }}").render([]) == "12AB"


def test_limits_of_output() -> None:
    template = ChatTemplate("{{ messages[0].content }}", max_chars=100)
    assert template.render([{"content": "x" * 100}]) == "x" * 100
    with pytest.raises(InvalidField, match="100 characters"):
        template.render([{"content": "x" * 101}])


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ x | nosuch }}", "{% for %}", "{" * 300_000, "{{ " + "(" * 20_000 + " }}"],
)
def test_invalid_sources(source: str) -> None:
    with pytest.raises(ModelLoadError, match="chat template `default`"):
        ChatTemplate(source)


def test_what_templates_rely_on() -> None:
    source = """
    {%- generation %}{% set x = 1 %}G{% endgeneration -%}
    {%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}
    {%- if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor -%}
    {{- x is defined }}{{ {"é": "<'>"} | tojson }}{{ strftime_now("%Y") | length -}}
    {{- "a-b".split("-") | join("+") }}{{ (dict(a=1) | items | list)[0][0] -}}
    {{- "{:>3}|{}".format("x", 1) }}{{ "%02d" % 7 }}{{ messages | map(attribute="role") | list -}}
    {{- tools is none }}{{ enable_thinking }}{{ bos_token }}{{ missing }}"""
    template = ChatTemplate(source, SPECIAL)
    text = template.render([SYSTEM, USER, ASSISTANT], enable_thinking=False)
    roles = "['system', 'user', 'assistant']"
    assert text == f'GuserFalse{{"é": "<\'>"}}4a+ba  x|107{roles}TrueFalse<s>'


def test_the_template_for_tools_is_taken_when_there_are_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools | length }} tools"})
    assert template.render([]) == "plain"
    assert template.render([], tools=[]) == "plain"
    assert template.render([], tools=TOOLS) == "1 tools"
    with pytest.raises(ModelLoadError, match="default"):
        ChatTemplate({"tool_use": "x"})


def test_a_template_can_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('Roles must alternate.') }}")
    with pytest.raises(InvalidField, match="Roles must alternate") as caught:
        template.render([USER])
    assert caught.value.field == "messages"


def test_reasoning_has_every_name_that_templates_know() -> None:
    """As in transformers: the first of the names that a message has counts."""
    template = ChatTemplate("{{ messages[0].thinking }}|{{ messages[0].reasoning_content }}")
    assert template.render([{"reasoning": "a"}]) == "a|a"
    assert template.render([{"thinking": "b", "reasoning": "a"}]) == "b|b"
    assert template.render([{"reasoning_content": "c", "thinking": "b"}]) == "b|c"
    assert template.render([{"reasoning_content": None, "reasoning": ""}]) == "|"
    assert template.render([{"content": "x"}]) == "|"


@pytest.mark.parametrize(
    ("messages", "variables", "name"),
    [
        (["x"], {}, "messages"),
        ({"role": "user"}, {}, "messages"),
        ([], {"documents": ["x"]}, "documents"),
        ([], {"documents": {"text": "x"}}, "documents"),
    ],
)
def test_messages_and_documents_are_lists_of_objects(
    messages: Any, variables: dict[str, Any], name: str
) -> None:
    with pytest.raises(InvalidField, match=f"{name} should be a list of objects"):
        ChatTemplate("x").render(messages, **variables)


def test_only_data_enters_a_template(tmp_path: Path) -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    with pytest.raises(InvalidField, match="PosixPath"):
        template.render([{"role": "user", "content": tmp_path}])
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidField):
        template.render([{"role": "user", "content": deep}])


CHAT = (
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
words = st.lists(st.sampled_from(["<|end|>", "<|", "end|>", "<|user|>", "<", "a b", "s>"]))


@given(contents=st.lists(words.map("".join), min_size=1, max_size=3), role=words.map("".join))
def test_messages_cannot_write_special_tokens(tiny: Tokenizer, contents, role: str) -> None:
    messages = [{"role": role, "content": content} for content in contents]
    template = ChatTemplate(CHAT)
    ids = template.encode(tiny, messages)
    names = ("<|user|>", "<|end|>", "<|assistant|>")
    user, end, assistant = (tiny.token_id(name) for name in names)
    special = [i for i in ids if i in tiny.special_ids]
    assert special == [user, end] * len(contents) + [assistant]
    assert tiny.decode(ids, skip_special_tokens=False) == template.render(messages)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("<{{ m.name }}>", "s"),
        ("<{{ m.name }}", "s>"),
        ("{{ m.name }}s>", "<"),
        ("{{ m.name | trim }}>", "x <s \n"),
        ("<{{ m.name | trim }}", " s>"),
        ("<{{ m.name }}>", " s"),
        ("{{ '<' + m.name + '>' }}", "s"),
        ("<|{{ m.role }}", "user|>"),
    ],
)
def test_messages_cannot_complete_special_tokens(tiny: Tokenizer, source: str, name: str) -> None:
    template = ChatTemplate("{% set m = messages[0] %}" + source)
    message = {"role": name, "name": name}
    ids = template.encode(tiny, [message])
    assert tiny.special_ids.isdisjoint(ids)
    assert tiny.decode(ids, skip_special_tokens=False) == template.render([message])


def test_templates_compare_labels_and_write_tokens_around_them(tiny: Tokenizer) -> None:
    source = "{% if role == 'user' %}<|{{ role }}|>{{ content[0].end }}{% endif %}{{ mood == 's' }}"
    template = ChatTemplate(f"{{% set role, content = messages[0].values() %}}{source}")
    message = {"role": "user", "content": [{"type": "s", "end": "hi"}]}
    expected = tiny.encode("<|user|>hiTrue")
    assert template.encode(tiny, [message], mood="s") == expected
    assert expected[0] in tiny.special_ids


def test_messages_are_printed_without_a_trace_of_the_guard(tiny: Tokenizer) -> None:
    template = ChatTemplate("{{ messages }}{{ messages | tojson }}{{ messages[0].a.strip() }}")
    messages = [{"a": " <s> ", "b": "user", "c": " <\n"}]
    assert tiny.decode(template.encode(tiny, messages)) == template.render(messages)


def test_harmless_messages_are_encoded_as_rendered(loaded) -> None:
    tokenizer = loaded.tokenizer
    template = ChatTemplate.for_tokenizer(tokenizer) or ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}", tokenizer.special_tokens
    )
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    text = template.render(messages)
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert template.encode(tokenizer, messages) == expected


def test_no_template(tiny: Tokenizer, tiny_llama: Tokenizer) -> None:
    assert ChatTemplate.for_tokenizer(tiny_llama) is None
    template = ChatTemplate.for_tokenizer(tiny)
    assert template is not None
    assert template.render([]) == "1"

#!/usr/bin/env python3
"""Oracles of chat templates, by jinja2 3.1 as transformers 5 sets it up.   usage: python gen.py

Reads conversations.json and src/data/templates, writes builtin.jsonl (our templates over all
conversations) and features.jsonl (small templates, each with what jinja2 writes or null if it
raises)."""
import datetime, json, os
import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = os.path.dirname(os.path.abspath(__file__))
TEMPLATES = os.path.join(HERE, "../../../src/data/templates")
OPEN, CLOSE = "\ufdd1", "\ufdd2"


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller):
        return OPEN + caller() + CLOSE


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
env.filters["tojson"] = tojson
env.globals["raise_exception"] = raise_exception
env.globals["strftime_now"] = lambda f: datetime.datetime(2026, 1, 1, 12).strftime(f)


def render(source, variables):
    out = env.from_string(source).render(**variables)
    spans, text, start = [], "", 0
    for c in out:
        if c == OPEN:
            start = len(text)
        elif c == CLOSE:
            if start < len(text):
                spans.append([start, len(text)])
        else:
            text += c
    return text, spans


data = json.load(open(f"{HERE}/conversations.json"))
for messages in data["conversations"].values():
    for m in messages:
        for key in [k for k, v in m.items() if v is None]:
            del m[key]
        if "reasoning_content" in m:
            m["thinking"] = m["reasoning_content"]

with open(f"{HERE}/builtin.jsonl", "w") as f:
    for name in sorted(os.listdir(TEMPLATES)):
        source = open(f"{TEMPLATES}/{name}").read()
        for conversation, messages in data["conversations"].items():
            for prompt in [False, True]:
                for tools in [None, data["tools"]] if name == "chatml.jinja" else [None]:
                    row = {"template": name[:-6], "conversation": conversation, "prompt": prompt, "tools": tools is not None}
                    try:
                        if not messages:
                            raise ValueError
                        row["out"], row["spans"] = render(source, dict(data["special_tokens"], messages=messages, tools=tools, documents=None, add_generation_prompt=prompt))
                    except Exception:
                        row["out"] = None
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")

VARIABLES = {"s": " a<b>\n\u00e9 ", "t": "x,y,,z", "l": [3, 1, 2], "m": [{"a": 1, "b": "q"}, {"a": 2}, {"b": None}], "d": {"k": "v", "items": [1], "n": {"z": 1.5}}, "none": None, "f": 2.5, "big": 9007199254740993}
FEATURES = """{{ s }}|{{ s|trim }}|{{ s.strip() }}|{{ s.lstrip() }}|{{ s.rstrip('\\n \\u00e9') }}
{{ t.split(',') }}{{ t.split(',', 1) }}{{ t.rsplit(',', 1) }}{{ ' a  b '.split() }}{{ ' a  b c'.split(None, 1) }}{{ t.split(',')[-1] }}
{{ t.partition(',') }}{{ t.rpartition(',') }}{{ t.partition('!') }}{{ t.rpartition('!') }}
{{ 'a\\nb\\r\\nc\\n'.splitlines() }}{{ 'a\\nb\\r\\nc\\n'.splitlines(true) }}{{ ''.splitlines() }}
{{ t.replace(',', '--') }}{{ t.replace(',', ';', 1) }}{{ 'aaa'.replace('', '-') }}{{ t|replace(',', 1) }}
{{ t.find('y') }}{{ t.find('q') }}{{ t.rfind(',') }}{{ t.index('z') }}{{ t.count(',') }}{{ 'aaaa'.count('aa') }}
{{ t.startswith('x') }}{{ t.startswith(('q', 'x,')) }}{{ t.endswith('z') }}{{ t.removeprefix('x') }}{{ t.removesuffix('z') }}
{{ 'hELLO wORLD'.title() }}|{{ 'hELLO wORLD'.capitalize() }}|{{ 'hello-world (a)'|title }}|{{ 'hELLO'|capitalize }}|{{ "it's".title() }}
{{ 'Ab'.upper() }}{{ 'Ab'.lower() }}{{ 'ab'.islower() }}{{ 'AB'.isupper() }}{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ ' '.isspace() }}{{ ''.isalpha() }}
{{ ', '.join(['a', 'b']) }}{{ ', '.join([1]) }}
{{ [1, 'b', none]|join('-') }}{{ m|join(', ', attribute='a') }}{{ t|join('.') }}
{{ l|sort }}{{ l|sort(reverse=true) }}{{ ['b', 'A', 'c']|sort }}{{ ['b', 'A', 'c']|sort(case_sensitive=true) }}{{ [1, 'a']|sort }}
{{ m[:2]|sort(attribute='a', reverse=true) }}{{ m|map(attribute='a')|list }}{{ m|map(attribute='a', default=0)|list }}{{ ['a', 'b']|map('upper')|list }}
{{ m|selectattr('a')|list }}{{ m|selectattr('a', 'equalto', 2)|list }}{{ m|rejectattr('a', 'defined')|list }}{{ l|select('odd')|list }}{{ l|reject('gt', 1)|list }}
{{ l|first }}{{ l|last }}{{ []|first }}{{ l|reverse|list }}{{ 'abc'|reverse }}{{ l|min }}{{ l|max }}{{ l|sum }}{{ [1.5, 2]|sum }}{{ [1, 1, 2]|unique|list }}
{{ l|length }}{{ t|count }}{{ d|length }}{{ nosuch|length }}{{ none|length }}
{{ d.items()|list }}{{ (1,) }}{{ (1,) == [1] }}|{{ d['items'] }}|{{ d.k }}|{{ d.nosuch }}|{{ d.get('k') }}|{{ d.get('q') }}|{{ d.get('q', 7) }}|{{ d.keys()|list }}|{{ d.values()|list }}
{{ d|dictsort }}{{ d|items|list }}{{ {'b': 1, 'A': 2}|dictsort }}{{ {'b': 1, 'A': 2}|dictsort(by='value', reverse=true) }}{{ {'b': 1, 'A': 2}|dictsort(true) }}
{{ d|tojson }}{{ d|tojson(indent=2) }}{{ s|tojson }}{{ s|tojson(ensure_ascii=true) }}{{ [1, 2]|tojson(separators=(',', ':')) }}{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}{{ []|tojson(indent=1) }}{{ '\\x07\\x7f'|tojson }}
{{ none|tojson }}{{ true|tojson }}{{ 1.0|tojson }}{{ 1e20|tojson }}{{ {1: 2, none: 3}|tojson }}{{ nosuch|tojson }}
{{ none }}{{ true }}{{ [none, true, 1.0, 'a', "it's", '"', 'a\\nb'] }}{{ {'a': [1]} }}{{ 1e16 }}{{ 1e-5 }}{{ 0.1 }}{{ 1e15 }}
{{ 'a' ~ 1 ~ none ~ true ~ 2.0 ~ [1] }}{{ 'a' 'b' }}{{ none|string }}{{ 3|string }}
{{ 1 + 2 * 3 }}{{ (1 + 2) * 3 }}{{ 2 ** 3 ** 2 }}{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 % 3 }}{{ -7 % 3 }}{{ 7 / 2 }}{{ 6 / 3 }}{{ 7.5 // 2 }}{{ -3|abs }}{{ 2 ** -1 }}{{ 7 // -2 }}{{ 7 % -3 }}
{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 1 == 1.0 }}{{ true == 1 }}{{ 'a' == 1 }}{{ [1] == [1] }}{{ {'a': 1} == {'a': 1} }}{{ 'a' < 'b' }}{{ [1, 2] < [1, 3] }}
{{ 1 < 'a' }}
{{ 'a' + 1 }}
{{ 'a' + none }}
{{ nosuch + 'a' }}
{{ nosuch.a }}
{{ nosuch() }}
{{ none.a }}|{{ none.a.b }}
{{ d.k.q }}|{{ 'a'[5] }}|{{ l[9] }}|{{ l[-1] }}|{{ 'abc'[-2] }}|{{ d['q'] }}
{{ l[1:] }}{{ l[:-1] }}{{ l[::-1] }}{{ 'abcdef'[1:4] }}{{ 'abcdef'[::2] }}{{ 'abcdef'[-3:] }}{{ l[5:] }}{{ 'abc'[::-2] }}
{{ 'a' in 'abc' }}{{ 'q' not in 'abc' }}{{ 1 in l }}{{ 'k' in d }}{{ 'a' in nosuch }}{{ not 1 in l }}
{{ 1 in 'a' }}
{{ 'a' in none }}
{{ 1 if true else 2 }}{{ 1 if false }}{{ 1 if false else 2 if false else 3 }}{{ (1 if false) is defined }}
{{ 0 or 'a' }}{{ '' and 'b' }}{{ none or none }}{{ not '' }}{{ true and not false }}
{{ nosuch is defined }}{{ d.k is defined }}{{ none is none }}{{ none is defined }}{{ 'a' is string }}{{ d is mapping }}{{ l is iterable }}{{ 'a' is iterable }}{{ none is iterable }}{{ nosuch is iterable }}{{ d is sequence }}{{ 'a' is sequence }}{{ 1 is number }}{{ true is number }}{{ true is boolean }}{{ 1 is integer }}{{ true is integer }}{{ 1.0 is float }}
{{ 1 is odd }}{{ 2 is even }}{{ 6 is divisibleby 3 }}{{ 6 is divisibleby(4) }}{{ 1 is eq 1 }}{{ 1 is not eq 1 }}{{ 2 is gt 1 }}{{ 1 is in [1] }}{{ none is sameas none }}{{ false is false }}{{ 0 is false }}{{ 'a' is lower }}{{ range is callable }}{{ 1 is string or true }}
{{ 1 is nosuch }}
{{ 1|nosuch }}
{{ nosuch|default('x') }}{{ ''|default('x') }}{{ ''|default('x', true) }}{{ none|d('y') }}{{ none|d('y', boolean=true) }}{{ nosuch|default }}
{{ '3'|int }}{{ 'q'|int }}{{ 'q'|int(7) }}{{ 3.9|int }}{{ '3.9'|int }}{{ '2.5'|float }}{{ 2|float }}{{ 2.567|round(2) }}{{ 2.4|round }}
{{ 'a\\nb\\n\\nc'|indent }}|{{ 'a\\nb'|indent(2, true) }}|{{ 'a\\n\\nb'|indent(1, blank=true) }}|{{ 'a\\nb'|indent('--') }}
{{ '<a&"\\'>'|e }}{{ '<'|safe }}{{ '<'|safe + '>' }}{{ '<' + '>'|safe }}{{ '<'|safe ~ '>' }}{{ 'a b c'|wordcount }}
{{ range(3)|list }}{{ range(1, 4)|list }}{{ range(5, 0, -2)|list }}{{ dict(a=1, b=2) }}{{ dict({'q': 1}, a=2) }}{{ dict(**{'z': 1}) }}
{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem }}{{ loop.nextitem }};{% endfor %}
{% for x in l if x > 1 %}{{ loop.index }}:{{ x }}{% else %}none{% endfor %}{% for x in [] %}{% else %}none{% endfor %}{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}
{% for x in none %}{% endfor %}
{% for a, b in [[1, 2, 3]] %}{% endfor %}
{% for x in range(9) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in [[1, [2]], [3, []]] recursive %}{{ x if x is number else '(' ~ loop(x) ~ ')' }}{{ loop.depth }}{% endfor %}
{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}
{% set ns = namespace(a=1) %}{% for i in l %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b is defined }}{% set a, b = [1, 2] %}{{ a }}{{ b }}
{% set x %}a{{ 1 }}{% endset %}{{ x }}|{% set x | upper | trim %} q {% endset %}{{ x }}
{% macro f(a, b=2, c='z') %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ f(1) }}{{ f(1, 3) }}{{ f(c=1, a=2) }}{{ f() }}{{ f(1)|upper }}
{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1, 2) }}
{% macro f(x) %}<{{ caller() }}{{ x }}>{% endmacro %}{% set y = 5 %}{% call f(1) %}in{{ y }}{% endcall %}{% macro g() %}{{ caller(7) }}{% endmacro %}{% call(z) g() %}{{ z }}{% endcall %}
{% macro f(n) %}{{ n }}{% if n %},{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(4) }}{% set q = 3 %}{% macro g() %}{{ q }}{% endmacro %}{{ g() }}
{% filter upper %}a{{ 'b' }}{% endfilter %}{% filter replace('a', 'b') | upper %}aa{% endfilter %}{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a is defined }}
{% raw %}{{ x }}{% y %}{% endraw %}|{%- raw -%} {{ {%- endraw -%} |
a  {#- c -#}  b {# c #} d{% if true -%}  x  {%- endif %} y
{%- if true %} z {% endif -%} w {{- ' q ' -}} v {{ 'r' }} u
  {% if true %}  A  {% endif %}  B{%+ if true %}  C  {% endif +%}  D
{% generation %}a{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}
{{ [1, 2] + [3] }}{{ [1] * 3 }}{{ 'ab' * 2 }}{{ 2 * 'ab' }}{{ (1, 2)[0] }}{{ [[1, 2]][0][1] }}{{ l.0 }}
{{ [].append(1) }}
{{ d.update({'a': 1}) }}
{{ d.pop('k') }}
{{ raise_exception('no ' ~ 1) }}
{{ strftime_now('%Y-%m-%d %d %b %Y %B %A %a %H:%M:%S %j %y %I %p %%') }}
{{ 1 // 0 }}
{{ 'a'() }}
{{ 1_000 }}{{ 1.5e3 }}{{ .5 }}
{{ {'a': 1, 'a': 2} }}{{ {'a': {'b': 1}}.a.b }}{{ {} }}{{ [] }}{{ 'é'|length }}{{ big }}{{ f }}{{ f * 2 }}
{{ -l[0] }}{{ - 2 ** 2 }}{{ -2|abs }}{{ not none is none }}{{ 1 + 1 is even }}{{ '%' }}{{ '}}' }}{{ '%}' }}
{{ l|map('string')|join }}{{ l | list | first }}{{ (l|first) + 1 }}{{ m[0].a ~ m[0]['b'] }}{{ m|length > 2 and 'yes' }}
{{ 'x' if l|length > 2 and 'a' in t or false else 'y' }}{{ d.n.z }}{{ d['n']['z'] }}{{ d.n.items()|list }}
{{ f is nosuch or 1 }}
{{ 'a' if }}
{{ 1 + }}
{% if true %}
{% endfor %}
{% nosuch %}
{{ 'a' 
{% set loop_messages = m[1:] if m else m %}{{ loop_messages|length }}{% set x = 1, 2 %}{{ x[1] }}{% set (p, q) = [1, 2] %}{{ q }}
{{ s.nosuch() }}
{{ l.nosuch }}|{{ s.nosuch }}|{{ none.x }}|{{ 1 .x }}"""

with open(f"{HERE}/features.jsonl", "w") as f:
    for source in FEATURES.split("\n"):
        source = source.replace("\\u00e9", "\u00e9")
        source = source.replace("  A  ", "\n  A\n  ").replace("  C  ", "\n  C\n  ") if "  A  " in source else source
        try:
            out = render(source, VARIABLES)[0]
        except Exception:
            out = None
        f.write(json.dumps({"source": source, "out": out}, ensure_ascii=False) + "\n")
json.dump(VARIABLES, open(f"{HERE}/variables.json", "w"))

"""A Jinja environment in which a hostile template can do no harm and not run for long.

Owns the language: what its operators, methods and loops may do. Every loop turn, call, filter,
test, operator, literal and output ticks the meter, which ends the rendering when time or volume is
used up; what makes much out of little in one step is checked before it. Invariant: between two
ticks the work is linear in the size of one value, and no value exceeds `Meter.max_chars`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace

from penstock.text.filters import FILTERS, GLOBALS, TESTS, join_checked
from penstock.text.meter import (
    METER,
    Meter,
    allow_format,
    allow_operation,
    allow_replace,
    check_format,
    concat,
    printed,
)

_STR_METHODS = frozenset(name for name in dir(str) if not name.startswith("_")) - {
    # padding makes much out of little; bytes and tables are of no use
    *("center", "ljust", "rjust", "zfill", "expandtabs"),
    *("encode", "translate", "maketrans", "format_map"),
}
_METHODS: dict[type, frozenset[str]] = {
    str: _STR_METHODS,
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    float: frozenset({"is_integer"}),
}
_OPEN_TYPES = (BlockReference, Cycler, Joiner, LoopContext, Namespace)


def render(template: Template, variables: Mapping[str, Any], meter: Meter) -> str:
    """Run a template of a `SandboxEnvironment` on plain JSON data.

    Raises:
        TemplateLimitError: the meter ran out.
        TemplateError, and what Python's operators and methods raise: the template failed.
    """
    pieces: list[str] = []
    num_chars = 0
    token = METER.set(meter)
    try:
        for piece in template.root_render_func(template.new_context(dict(variables))):
            num_chars += len(piece)
            meter.allow(num_chars)
            meter.tick()
            pieces.append(piece)
    finally:
        METER.reset(token)
    return "".join(pieces)


class _MeteredCode(CodeGenerator):
    """Puts the meter where the environment has no hook."""

    def enter_frame(self, frame: Frame) -> None:
        super().enter_frame(frame)
        if frame.loop_frame:
            self.writeline("environment.tick()")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test is not None:  # turns that it leaves out never reach the body
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            node.test = nodes.And(tick, node.test).set_lineno(node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._charged(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._charged(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._charged(super().visit_Dict, node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._charged(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._charged(super().visit_Compare, node, frame)

    def _charged(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.charge(")
        visit(node, frame)
        self.write(")")


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - declared so by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _DataFormatter(SandboxedFormatter):
    """Formats data only, also where a field names an attribute of an argument."""

    def get_field(
        self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, str]:
        value, first = super().get_field(field_name, args, kwargs)
        METER.get().size(value)
        return value, first


@pass_context
def _finalize(_context: Context, value: Any) -> str:
    """What an output prints. (With the context passed, Jinja folds no constants into it.)"""
    text = printed(value)
    METER.get().tick(1 + len(text))
    return text


class SandboxEnvironment(ImmutableSandboxedEnvironment):
    """The Jinja that published chat templates are written in, metered."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    code_generator_class = _MeteredCode
    concat = staticmethod(concat)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            optimized=False,  # folding constants would run operations before there is a meter
            finalize=_finalize,
        )
        self.globals = dict(GLOBALS)
        self.filters = dict(FILTERS)
        self.tests = dict(TESTS)

    @staticmethod
    def tick() -> bool:
        METER.get().tick()
        return True

    @staticmethod
    def charge(value: Any) -> Any:
        return METER.get().charge(value)

    @staticmethod
    def concat_values(values: tuple[Any, ...]) -> str:
        return concat(map(printed, values))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        methods = _METHODS.get(type(obj))
        if methods is not None:
            return attr in methods
        return isinstance(obj, _OPEN_TYPES) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        template: str = value.__self__

        def format_checked(*args: Any, **kwargs: Any) -> str:
            for _, _, spec, _ in string.Formatter().parse(template):
                check_format(spec or "")
            allow_format(template, template.count("{"), [*args, *kwargs.values()])
            return _DataFormatter(self).vformat(template, args, kwargs)

        return format_checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        allow_operation(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        meter = METER.get()
        return meter.charge_sum(left, right, result) if operator == "+" else meter.charge(result)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.tick()
        # Some calls wrap their arguments: a macro in `varargs`. (Jinja's own have an underscore.)
        meter.check_depth((*args, *(v for name, v in kwargs.items() if name[0] != "_")))
        if isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str):
            if obj.__name__ == "join" and len(args) == 1:
                return meter.charge(join_checked(args[0], obj.__self__))
            if obj.__name__ == "replace" and len(args) >= 2:
                allow_replace(obj.__self__, args[0], args[1])
        return meter.charge(super().call(context, obj, *args, **kwargs))

"""Options that are declared once, as the fields of dataclasses: their docs, and functions that take them by keyword."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
LISTED = "Options: listed here."


def takes(*groups: type) -> Callable[[Function], Function]:
    """Show the fields of dataclasses in the signature and the docstring of a function with `**options`.

    In the docstring they replace the line "Options: listed here.". Any other keyword argument is a TypeError with the
    nearest name.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind != inspect.Parameter.VAR_KEYWORD]
        fields = {field.name: (group, field) for group in groups for field in _own_first(group)}
        further = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=field.type)
            for name, (_, field) in fields.items()
            if name not in signature.parameters
        ]
        names = [each.name for each in (*own, *further)]

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name not in names:
                    near = difflib.get_close_matches(name, names, n=1)
                    hint = f": did you mean {near[0]!r}?" if near else ""
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}")
            return function(*args, **keywords)

        checked.__signature__ = signature.replace(parameters=[*own, *further])
        listed = [
            _line(f"{each.name} ({each.default!r}): {field_docs(fields[each.name][0])[each.name]}") for each in further
        ]
        checked.__doc__ = inspect.cleandoc(function.__doc__).replace(LISTED, "\n".join(["Options:", *listed]))
        return checked

    return decorate


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases."""
    found: dict[str, str] = {}
    for each in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0].body
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                found[field.target.id] = " ".join(doc.value.value.split())
    return found


def _own_first(cls: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass, its own first, those of its most general bases last."""
    declared = [inspect.get_annotations(base) for base in cls.__mro__]
    place = {name: min(i for i, names in enumerate(declared) if name in names) for names in declared for name in names}
    return sorted(dataclasses.fields(cls), key=lambda field: place[field.name])


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _line(text: str) -> str:
    return textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8)

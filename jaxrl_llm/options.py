"""Options as dataclasses: functions whose keyword arguments are the fields of one, and the docstrings of fields."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable
from typing import Any

LISTED = "    Options: listed here."


def takes(*groups: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function with `**options` the signature that the fields of these dataclasses make, and refuse others.

    A line "Options: listed here." of its docstring is replaced by the options with their defaults and docstrings.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = {field.name: field for group in groups for field in _sorted_fields(group)}
        further = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(field))
            for name, field in fields.items()
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
        if checked.__doc__ and LISTED in checked.__doc__:
            docs = {name: doc for group in groups for name, doc in field_docs(group).items()}
            lines = [f"{each.name} ({each.default!r}): {docs[each.name]}" for each in further]
            wrapped = [textwrap.fill(line, 116, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in lines]
            checked.__doc__ = checked.__doc__.replace(LISTED, "\n".join(["    Options:", *wrapped]))
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


def _sorted_fields(cls: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass, its own first, those of its most general bases last."""
    declared = [inspect.get_annotations(base) for base in cls.__mro__]
    place = {name: min(i for i, names in enumerate(declared) if name in names) for names in declared for name in names}
    return sorted(dataclasses.fields(cls), key=lambda field: place[field.name])


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

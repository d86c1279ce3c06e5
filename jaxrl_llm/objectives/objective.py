"""`@objective`: a function of arrays that checks its arguments and has its closed-form gradient right under it.

    @objective(constants=("logp_old", "advantages"), clip_low="[0, inf)", clip_high="[0, inf)")
    def cispo_loss(
        logp_policy: Float[Array, "*batch"],
        logp_old: Float[Array, "*batch"],
        advantages: Float[Array, "*batch"],
        *,
        clip_low: float = 1.0,
        clip_high: float = 4.0,
    ) -> Float[Array, "*batch"]:
        ...

    @cispo_loss.gradient
    def _(logp_policy, logp_old, advantages, *, clip_low, clip_high):
        ...                                        # one derivative for each differentiable argument

    cispo_loss(logp_policy, logp_old, advantages)       # the loss
    cispo_loss.grad(logp_policy, logp_old, advantages)  # the tuple of its derivatives

Both functions get the same checked arguments. The signature is the declaration: axes of one name have one size, and
`*batch` stands for any number of leading axes.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrl_llm.numerics import check_range, checked_mask, floating

ANNOTATION = re.compile(r"""(Float|Int|Bool|Real)\[[\w.]*Array, ['"]([^'"]*)['"]\]""")
INTERVAL = re.compile(r"([\[(])(.+), (.+)([\])])")


def objective(
    function: Callable[..., Array] | None = None,
    /,
    *,
    constants: tuple[str, ...] = (),
    widen: bool = True,
    **ranges: str,
) -> Callable[..., Any]:
    """Declare an objective: a plain function of the same signature, with `.gradient`, `.grad` and `.hyperparameters`.

    Arrays are checked against the annotations, floating ones are widened to float32, and an optional mask that is left
    out is all true. `.gradient` registers the closed form, a function of the same arguments; `.grad` calls it;
    `.hyperparameters` has the default of each keyword argument.

    Args:
        function: the objective, if the decorator is used without arguments.
        constants: arguments through which no gradient flows.
        widen: False leaves floating arrays in their dtype.
        ranges: the interval of a hyperparameter, such as beta="(0, inf)"; None and traced numbers pass.

    Raises:
        ValueError: for a constant or a range of an argument that the function does not have, or an interval in another
            form.
    """
    if function is None:
        return lambda function: objective(function, constants=constants, widen=widen, **ranges)
    signature = inspect.signature(function)
    declared = {name: Declared.of(each.annotation) for name, each in signature.parameters.items()}
    arrays = {name: each for name, each in declared.items() if each is not None}
    intervals = {name: _interval(interval) for name, interval in ranges.items()}
    unknown = sorted({*constants, *ranges} - set(declared))
    if unknown:
        raise ValueError(
            f"{function.__name__} must have every argument that is declared, but has no {', '.join(unknown)}."
        )

    def prepared(*args: Any, **kwargs: Any) -> inspect.BoundArguments:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        bound.apply_defaults()
        bound.arguments |= _checked(arrays, bound.arguments, widen)
        bound.arguments |= {name: jax.lax.stop_gradient(bound.arguments[name]) for name in constants}
        for name, interval in intervals.items():
            if bound.arguments[name] is not None:
                check_range(**interval, **{name: bound.arguments[name]})
        return bound

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Array:
        bound = prepared(*args, **kwargs)
        return function(*bound.args, **bound.kwargs)

    def gradient(closed_form: Callable[..., Any]) -> Callable[..., tuple[Array, ...]]:
        """Register the closed form: it returns the derivative, or a tuple of them, of the summed values."""

        def grad(*args: Any, **kwargs: Any) -> tuple[Array, ...]:
            bound = prepared(*args, **kwargs)
            slopes = closed_form(*bound.args, **bound.kwargs)
            return slopes if isinstance(slopes, tuple) else (slopes,)

        grad.__module__, grad.__name__, grad.__qualname__ = call.__module__, "grad", f"{call.__qualname__}.grad"
        grad.__signature__ = signature.replace(return_annotation="tuple[Array, ...]")
        grad.__doc__ = f"Closed-form gradient of `{call.__name__}`: {inspect.getdoc(closed_form) or 'see its source.'}"
        call.grad = grad
        return grad

    call.__signature__, call.__doc__, call.gradient = signature, _documented(function, ranges), gradient
    call.hyperparameters = {
        name: each.default for name, each in signature.parameters.items() if each.kind == each.KEYWORD_ONLY
    }
    return call


class Declared(NamedTuple):
    """An array argument, as its annotation declares it."""

    kind: str
    axes: tuple[str, ...]
    number: bool  # or a plain number
    optional: bool  # or None

    @classmethod
    def of(cls, annotation: Any) -> Declared | None:
        """The declaration of an annotation like `Float[Array, "*batch time"]`; None if it is not an array."""
        annotation = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        found = ANNOTATION.search(annotation)
        if found is None:
            return None
        return cls(found[1], tuple(found[2].split()), "float | " in annotation, annotation.endswith("| None"))


def _checked(declared: dict[str, Declared], given: dict[str, Any], widen: bool) -> dict[str, Array]:
    """The arrays by name: of their kind of numbers, with axes of one name of one size."""
    sizes: dict[str, Any] = {}
    found: dict[str, Array] = {}
    for name, (kind, axes, number, optional) in declared.items():
        first, like = next(iter(found.items()), (None, None))
        if given[name] is None and optional:
            found[name] = jnp.ones(_known(axes, sizes), bool)
            continue
        array = jnp.asarray(given[name], like.dtype if number else None)
        found[name] = _of_kind(name, array, kind, widen)
        if (number and array.ndim == 0) or _fits(axes, array.shape, sizes):
            continue
        wanted = f"{'a number or ' if number else ''}[{', '.join(axes)}]"
        if first is not None:
            wanted += f" = [{', '.join(map(str, _known(axes, sizes)))}] as in {first}"
        raise ValueError(f"{name} must be {wanted}, but has the shape {list(array.shape)}.")
    return found


def _of_kind(name: str, array: Array, kind: str, widen: bool) -> Array:
    if kind == "Float":
        wide = floating(name, array)
        return wide if widen else array
    if kind == "Int" and not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, but are {array.dtype}.")
    if name == "mask":
        return checked_mask(array, array.shape, of=name)
    if kind == "Bool" and array.dtype != bool:
        raise ValueError(f"{name} must be boolean, but is {array.dtype}.")
    return array


def _fits(axes: tuple[str, ...], shape: tuple[int, ...], sizes: dict[str, Any]) -> bool:
    """True if a shape has these axes; if it does, the sizes of new ones are added."""
    leading = axes[0] if axes[0].startswith("*") else ""
    names = axes[1:] if leading else axes
    split = len(shape) - len(names)
    if split < 0 or (split and not leading):
        return False
    found = {leading: shape[:split], **dict(zip(names, shape[split:], strict=True))}
    fits = all(sizes.get(axis, size) == size for axis, size in found.items())
    sizes |= found if fits else {}
    return fits


def _known(axes: tuple[str, ...], sizes: dict[str, Any]) -> list[Any]:
    """The sizes of axes, or their names where no array had them yet."""
    parts = [sizes.get(axis, axis) for axis in axes]
    return [size for part in parts for size in (part if isinstance(part, tuple) else (part,))]


def _interval(interval: str) -> dict[str, Any]:
    """The arguments of `check_range`."""
    found = INTERVAL.fullmatch(interval)
    if found is None:
        raise ValueError(f'an interval must be written as "[0, inf)", but is {interval!r}.')
    opening, low, high, closing = found.groups()
    return {"low": float(low), "high": float(high), "open_low": opening == "(", "open_high": closing == ")"}


def _documented(function: Callable[..., Any], ranges: dict[str, str]) -> str:
    """The docstring, with a paragraph on errors before its source if it has none."""
    text, source, rest = (inspect.getdoc(function) or "").partition("\nSource:")
    if "\nRaises:" in text:
        return text + source + rest
    errors = "ValueError: if a shape or dtype is not that of the signature"
    if ranges:
        listed = ", ".join(f"{name} in {interval}" for name, interval in ranges.items())
        errors += f", or a hyperparameter is out of range: {listed}"
    errors = textwrap.fill(f"{errors}.", 112, initial_indent=" " * 4, subsequent_indent=" " * 8)
    return f"{text.rstrip()}\n\nRaises:\n{errors}\n{source}{rest}"

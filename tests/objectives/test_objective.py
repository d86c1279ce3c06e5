"""The decorator of the objectives: the checks that a signature declares, and the gradient under its function."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Bool, Float, Int, Real

from jaxrl_llm.objectives.objective import objective


@objective(constants=("shift",), scale="(0, 2]")
def scaled(
    x: Float[Array, "*batch time"],
    counts: Int[Array, "*batch"],
    good: Bool[Array, "*batch"],
    weight: Real[Array, "time"],
    mask: Bool[Array, "*batch time"] | None = None,
    *,
    shift: float | Float[Array, "*batch time"] = 0.0,
    scale: float | None = 1.0,
) -> Float[Array, "*batch"]:
    """Scale a row.

    Source: nowhere.
    """
    scale = 1.0 if scale is None else scale
    return jnp.where(good, scale * jnp.where(mask, weight * (x - shift), 0).sum(axis=-1) * counts, 0)


@scaled.gradient
def _(x, counts, good, weight, mask, *, shift, scale):
    """The weights."""
    return jnp.where(mask, scale * weight * (counts * good)[..., None], 0)


X, GIVEN = jnp.ones((2, 3)), {"counts": jnp.array([1, 2]), "good": jnp.array([True, False]), "weight": jnp.arange(3)}


def test_the_result_is_a_plain_function_with_the_same_signature_and_documented_errors():
    assert inspect.isfunction(scaled) and inspect.isfunction(scaled.grad)
    assert list(inspect.signature(scaled).parameters) == list(inspect.signature(scaled.grad).parameters)
    assert scaled.hyperparameters == {"shift": 0.0, "scale": 1.0}
    words = " ".join(scaled.__doc__.split())
    assert words.endswith("or a hyperparameter is out of range: scale in (0, 2]. Source: nowhere.")
    assert scaled.grad.__doc__ == "Closed-form gradient of `scaled`: The weights."
    assert (scaled.grad.__name__, scaled.grad.__qualname__) == ("grad", "scaled.grad")


def test_value_gradient_and_constants():
    np.testing.assert_array_equal(scaled(X, **GIVEN, scale=None), [3, 0])
    np.testing.assert_array_equal(scaled(X, **GIVEN, mask=jnp.array([[0, 1, 0]] * 2), scale=2.0), [2, 0])
    (closed,) = scaled.grad(X, **GIVEN, scale=0.5)
    total = lambda x, shift: scaled(x, **GIVEN, shift=shift, scale=0.5).sum()  # noqa: E731
    by_autodiff, of_constant = jax.jit(jax.grad(total, argnums=(0, 1)))(X, np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(closed, by_autodiff)
    assert (of_constant == 0).all()
    assert scaled(X.astype(jnp.bfloat16), **GIVEN).dtype == jnp.float32
    assert objective(widen=False)(lambda x: x)(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 3), int)}, "x must be floating, but is int32."),
        ({"x": jnp.ones(())}, r"x must be [*batch, time], but has the shape []."),
        ({"counts": jnp.ones(2)}, "counts must be integers, but are float32."),
        ({"counts": jnp.ones(3, int)}, r"counts must be [*batch] = [2] as in x, but has the shape [3]."),
        ({"good": jnp.array([1, 0])}, "good must be boolean, but is int32."),
        ({"weight": jnp.ones((2, 3))}, r"weight must be [time] = [3] as in x, but has the shape [2, 3]."),
        ({"mask": jnp.ones(3, bool)}, r"mask must be [*batch, time] = [2, 3] as in x, but has the shape [3]."),
        ({"mask": jnp.full((2, 3), 2)}, "mask must be boolean, or 0 and 1, but is int32 and holds other values."),
        ({"shift": jnp.ones(3)}, r"shift must be a number or [*batch, time] = [2, 3] as in x, but has the shape [3]."),
        ({"scale": 2.5}, "scale must lie in (0, 2], but is 2.5."),
    ],
)
def test_an_argument_that_is_not_as_declared_is_refused_by_value_and_gradient(change, message):
    for function in (scaled, scaled.grad):
        with pytest.raises(ValueError) as refusal:
            function(**{"x": X, **GIVEN, **change})
        assert str(refusal.value) == message


def test_a_wrong_number_of_arguments_is_refused_with_the_name_of_the_function():
    with pytest.raises(TypeError, match=r"^scaled\(\) missing a required argument: 'counts'$"):
        scaled(X)


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"constants": ("y",), "z": "[0, 1]"}, "f must have every argument that is declared, but has no y, z."),
        ({"x": "0 to 1"}, "an interval must be written as \"[0, inf)\", but is '0 to 1'."),
    ],
)
def test_a_wrong_declaration_is_refused(declaration, message):
    def f(x):
        return x

    with pytest.raises(ValueError) as refusal:
        objective(**declaration)(f)
    assert str(refusal.value) == message

"""Every public objective has a closed-form gradient, and `jax.grad` agrees with it."""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.objectives
from tests.objectives.cases import CONSTANTS, TOOLS, Sizes, public_functions

CASES = {
    f"{function.__module__.split('.')[2]}.{function.__name__}": build
    for info in pkgutil.iter_modules(tests.objectives.__path__)
    if info.name.startswith("cases_")
    for function, build in importlib.import_module(f"tests.objectives.{info.name}").CASES.items()
}
EXEMPT: dict[str, str] = {
    "preference.pair_loss": "the decorator of the preference losses",
    "preference.kto_reference_point": "a constant of kto_loss, through which no gradient flows",
    "policy_gradient.truncated_importance_weight": "a constant weight, through which no gradient flows",
    "rlhf.best_of_n": "a distribution, not an objective",
    "rlhf.gibbs_optimum": "a distribution, not an objective",
    "rlhf.best_of_n_kl_bound": "a function of the number of draws",
}
TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-10}


def objectives():
    functions = public_functions(skip=TOOLS | CONSTANTS)
    return {name: each for name, each in functions.items() if name not in EXEMPT}


def cast(arrays, dtype):
    """As jax arrays: the floating ones of a dtype, integers of 32 bits."""
    kinds = {"f": dtype, "V": dtype, "i": jnp.int32, "b": jnp.bool_}
    return tuple(jnp.asarray(array, kinds[np.asarray(array).dtype.kind]) for array in arrays)


def gradients(name, case):
    """Of the sum of the objective's values, by autodiff and in closed form, as functions of the arrays."""
    function, count = objectives()[name], len(case.differentiable)

    def by_autodiff(*arrays):
        total = lambda *given: function(*given, *arrays[count:], **case.settings).sum()  # noqa: E731
        return jax.grad(total, argnums=tuple(range(count)))(*arrays[:count])

    def in_closed_form(*arrays):
        return function.grad(*arrays, **case.settings)

    return by_autodiff, in_closed_form


def relative_error(found, expected):
    """The largest difference within one gradient against its largest entry."""
    assert len(found) == len(expected)
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert np.isfinite(one).all() and np.isfinite(other).all()
        scale = max(np.abs(other).max(initial=0.0), 1e-3)
        worst = max(worst, float(np.abs(one - other).max(initial=0.0) / scale))
    return worst


def jitted(by_autodiff, in_closed_form):
    """Both gradients, plain and under `vmap`, as one program."""

    def both(arrays, batched):
        mapped = jax.vmap(in_closed_form)(*batched), jax.vmap(by_autodiff)(*batched)
        return (in_closed_form(*arrays), by_autodiff(*arrays)), mapped

    return jax.jit(both)


def stacked(arrays):
    """Two different rows of each array, for `vmap`."""
    return tuple(jnp.stack([array, array[::-1]]) for array in arrays)


def test_every_objective_has_its_gradient_and_a_case():
    assert len(objectives()) > 5
    assert {name for name, function in objectives().items() if not hasattr(function, "grad")} == set()
    assert set(objectives()) == set(CASES)
    assert set(EXEMPT) <= set(public_functions(skip=TOOLS | CONSTANTS))


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_gradient_takes_the_arguments_of_its_objective(name):
    function = objectives()[name]
    own, gradient = inspect.signature(function), inspect.signature(function.grad)
    assert own.parameters == gradient.parameters
    assert f"`{function.__name__}`" in function.grad.__doc__ and "Raises:" in function.__doc__


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_closed_form_is_what_autodiff_finds(name, dtype, record_property):
    with jax.enable_x64(dtype == jnp.float64):
        case = CASES[name](np.random.default_rng(7), Sizes())
        by_autodiff, in_closed_form = gradients(name, case)
        arrays = cast((*case.differentiable, *case.constants), dtype)
        (found, expected), batched = jitted(by_autodiff, in_closed_form)(arrays, stacked(arrays))
        assert max(np.abs(gradient).max() for gradient in expected) > 1e-3, "a gradient of 0 tests nothing"
        errors = [relative_error(found, expected), relative_error(*batched)]
        if dtype == jnp.float64:  # eager once: operation by operation is slow to compile
            errors.append(relative_error(in_closed_form(*arrays), by_autodiff(*arrays)))
        record_property("closed form", (name, dtype.__name__, max(errors)))
        assert max(errors) < TOLERANCE[dtype]


SIZES = st.builds(
    Sizes,
    batch=st.integers(1, 5),
    time=st.integers(1, 6),
    vocab=st.integers(2, 9),
    beta=st.floats(0.01, 3.0),
    kept=st.floats(0.0, 1.0),
)


@pytest.mark.parametrize("name", sorted(CASES))
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=3)
def test_the_closed_form_holds_for_any_shape_mask_and_beta(name, sizes, seed):
    with jax.enable_x64(True):
        case = CASES[name](np.random.default_rng(seed), sizes)
        by_autodiff, in_closed_form = gradients(name, case)
        arrays = cast((*case.differentiable, *case.constants), jnp.float64)
        found, expected = jax.jit(lambda *given: (in_closed_form(*given), by_autodiff(*given)))(*arrays)
        assert relative_error(found, expected) < TOLERANCE[jnp.float64]


@pytest.mark.parametrize("name", sorted(CASES))
def test_constants_carry_no_gradient(name):
    """Arguments without a closed-form gradient: advantages, the log-probabilities of the sampler, …"""
    case = CASES[name](np.random.default_rng(3), Sizes())
    arrays = cast((*case.differentiable, *case.constants), jnp.float32)
    floating = [
        i for i, a in enumerate(arrays) if i >= len(case.differentiable) and jnp.issubdtype(a.dtype, jnp.floating)
    ]
    if floating:
        function = objectives()[name]
        total = jax.grad(lambda *given: function(*given, **case.settings).sum(), argnums=tuple(floating))
        assert all((gradient == 0).all() for gradient in jax.jit(total)(*arrays))


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_wrong_dtype_and_a_wrong_shape_are_refused(name):
    case = CASES[name](np.random.default_rng(3), Sizes())
    function = objectives()[name]
    arrays = cast((*case.differentiable, *case.constants), jnp.float32)
    for attempt in (function, function.grad):
        with pytest.raises(ValueError, match="must be floating"):
            attempt(arrays[0].astype(jnp.int32), *arrays[1:], **case.settings)
        if len(arrays) > 1:
            with pytest.raises(ValueError, match="must"):
                attempt(*arrays[:-1], jnp.concatenate([arrays[-1]] * 2, axis=-1), **case.settings)


@pytest.mark.parametrize("name", sorted(CASES))
def test_bfloat16_inputs_are_widened(name):
    case = CASES[name](np.random.default_rng(3), Sizes())
    narrow = cast((*case.differentiable, *case.constants), jnp.bfloat16)
    widened = cast([np.asarray(a, np.float32) if a.dtype == jnp.bfloat16 else a for a in narrow], jnp.float32)
    function = objectives()[name]
    value, expected = jax.jit(lambda *given: [function(*arrays, **case.settings) for arrays in given])(narrow, widened)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)

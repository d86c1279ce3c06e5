"""Every public objective has a closed-form gradient, and `jax.grad` agrees with it."""

import functools
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests.objectives
from tests.objectives.cases import CONSTANTS, TOOLS, Sizes, public_functions

CASES = {
    f"{function.__module__.split('.')[2]}.{function.__name__}{variant and f', {variant}'}": (function, build)
    for info in pkgutil.iter_modules(tests.objectives.__path__)
    if info.name.startswith("cases_")
    for function, builds in importlib.import_module(f"tests.objectives.{info.name}").CASES.items()
    for variant, build in (builds if isinstance(builds, dict) else {"": builds}).items()
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
# Drawn inputs of one shape, for one program: the defaults twice, and in float64 masks of any share and any β.
ANY = [Sizes(beta=beta, kept=kept) for beta, kept in zip(np.geomspace(0.01, 3, 6), np.linspace(0, 1, 6), strict=True)]
DRAWS = {jnp.float32: [Sizes(), Sizes()], jnp.float64: [Sizes(), Sizes(), *ANY]}
SMALLEST = Sizes(batch=1, time=1, vocab=2, kept=1.0)


def objectives():
    functions = public_functions(skip=TOOLS | CONSTANTS)
    return {name: each for name, each in functions.items() if name not in EXEMPT}


def cast(arrays, dtype):
    """The floating ones of a dtype, integers of 32 bits."""
    kinds = {"f": dtype, "i": np.int32, "b": bool}
    return tuple(np.asarray(array, kinds[np.asarray(array).dtype.kind]) for array in arrays)


def program(function, count, names):
    """Gradients in closed form and by autodiff; in float32 of constants too, and values, of narrow inputs too."""

    def one(arrays, numbers, settings):
        given = dict(zip(names, numbers, strict=True)) | settings
        is_double = arrays[0].dtype == jnp.float64
        floating = tuple(i for i, each in enumerate(arrays) if jnp.issubdtype(each.dtype, jnp.floating))
        floating = floating[:count] if is_double else floating
        by_autodiff = jax.grad(lambda *arrays: function(*arrays, **given).sum(), argnums=floating)(*arrays)
        found = {"closed form": function.grad(*arrays, **given), "autodiff": by_autodiff[:count]}
        if is_double:
            return found
        narrow = [a.astype(jnp.bfloat16) if i in floating else a for i, a in enumerate(arrays)]
        widened = [a.astype(jnp.float32) if i in floating else a for i, a in enumerate(narrow)]
        return found | {
            "value": function(*arrays, **given),
            "of constants": by_autodiff[count:],
            "widened": (function(*narrow, **given), function(*widened, **given)),
        }

    return one


@functools.cache
def found(name, dtype):
    """Of every draw: under `vmap`, the numbers among the settings traced."""
    function, build = CASES[name]
    cases = [build(np.random.default_rng([7, seed]), sizes) for seed, sizes in enumerate(DRAWS[dtype])]
    names = [name for name, value in cases[0].settings.items() if isinstance(value, float)]
    static = {name: value for name, value in cases[0].settings.items() if name not in names}
    one = program(function, len(cases[0].differentiable), names)
    with jax.enable_x64(dtype == jnp.float64):
        arrays = [cast((*case.differentiable, *case.constants), dtype) for case in cases]
        numbers = [[np.asarray(case.settings[name], dtype) for name in names] for case in cases]
        stacked = jax.tree.map(lambda *each: np.stack(each), *zip(arrays, numbers, strict=True))
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda *given: one(*given, static)))(*stacked))


def relative_errors(found, expected):
    """Of each draw: the largest difference within one gradient against its largest entry."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert np.isfinite(one).all() and np.isfinite(other).all()
        for mine, its in zip(one, other, strict=True):
            yield float(np.abs(mine - its).max(initial=0.0) / max(np.abs(its).max(initial=0.0), 1e-3))


def test_every_objective_has_its_gradient_and_a_case():
    assert len(objectives()) > 5
    assert {name for name, function in objectives().items() if not hasattr(function, "grad")} == set()
    assert set(objectives()) == {name.split(",")[0] for name in CASES}
    assert set(EXEMPT) <= set(public_functions(skip=TOOLS | CONSTANTS))


@pytest.mark.parametrize("name", objectives())
def test_the_gradient_takes_the_arguments_of_its_objective(name):
    function = objectives()[name]
    own, gradient = inspect.signature(function), inspect.signature(function.grad)
    assert own.parameters == gradient.parameters
    assert f"`{function.__name__}`" in function.grad.__doc__ and "Raises:" in function.__doc__


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_closed_form_is_what_autodiff_finds(name, dtype, record_property):
    gradients = found(name, dtype)
    assert max(np.abs(gradient[0]).max() for gradient in gradients["autodiff"]) > 1e-3, "a gradient of 0 tests nothing"
    error = max(relative_errors(gradients["closed form"], gradients["autodiff"]))
    record_property("closed form", (name, dtype.__name__, error))
    assert error < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_value_and_closed_form_are_the_same_without_jit_and_vmap(name):
    function, build = CASES[name]
    case = build(np.random.default_rng([7, 0]), DRAWS[jnp.float32][0])
    arrays = cast((*case.differentiable, *case.constants), np.float32)
    expected = found(name, jnp.float32)
    np.testing.assert_allclose(function(*arrays, **case.settings), expected["value"][0], rtol=1e-5, atol=1e-6)
    closed = [np.asarray(each)[None] for each in function.grad(*arrays, **case.settings)]
    assert max(relative_errors(closed, [each[:1] for each in expected["autodiff"]])) < TOLERANCE[jnp.float32]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_the_closed_form_holds_for_a_single_token(name):
    function, build = CASES[name]
    case = build(np.random.default_rng(1), SMALLEST)
    count = len(case.differentiable)

    @jax.jit
    def both(*arrays):
        total = lambda *given: function(*given, *arrays[count:], **case.settings).sum()  # noqa: E731
        return function.grad(*arrays, **case.settings), jax.grad(total, argnums=tuple(range(count)))(*arrays[:count])

    with jax.enable_x64(True):
        arrays = cast((*case.differentiable, *case.constants), np.float64)
        closed, by_autodiff = jax.tree.map(lambda each: np.asarray(each)[None], both(*arrays))
    assert max(relative_errors(closed, by_autodiff)) < TOLERANCE[jnp.float64]


@pytest.mark.parametrize("name", sorted(CASES))
def test_constants_carry_no_gradient(name):
    """Arguments without a closed-form gradient: advantages, the log-probabilities of the sampler, …"""
    assert all((gradient == 0).all() for gradient in found(name, jnp.float32)["of constants"])


@pytest.mark.parametrize("name", sorted(CASES))
def test_bfloat16_inputs_are_widened(name):
    value, expected = found(name, jnp.float32)["widened"]
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)


KINDS = {"Float[": (np.int32, "floating"), "Int[": (np.float32, "integers"), "Bool[": (np.int32, "boolean")}


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_array_of_a_wrong_dtype_or_shape_is_refused_by_its_name_under_jit_too(name):
    function, build = CASES[name]
    case = build(np.random.default_rng(3), Sizes())
    arrays = cast((*case.differentiable, *case.constants), np.float32)
    value, grad = (functools.partial(each, **case.settings) for each in (function, function.grad))
    for place, parameter in enumerate(list(inspect.signature(function).parameters.values())[: len(arrays)]):
        array, annotation = arrays[place], inspect.formatannotation(parameter.annotation)
        changes = [(np.concatenate([array] * 2, axis=-1), r"(a number or )?\[.* but has the shape")] if place else []
        for kind, (dtype, of_kind) in KINDS.items():
            # A number may be whole, and a mask of numbers is read.
            if kind in annotation and "float |" not in annotation and parameter.name != "mask":
                changes.append((array.astype(dtype), f"{of_kind}, but (is|are) {np.dtype(dtype)}"))
        for wrong, message in changes:
            given = [*arrays[:place], wrong, *arrays[place + 1 :]]
            for attempt in (value, grad, functools.partial(jax.eval_shape, value)):
                with pytest.raises(ValueError, match=f"{parameter.name} must be {message}"):
                    attempt(*given)

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxrl_llm import runtime
from jaxrl_llm.analysis import landscape
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from tests.analysis.landscape.conftest import flat
from tests.conftest import TINY, random_params

pytestmark = pytest.mark.slow

SMALL = GPT2(GPT2Config(vocab_size=7, n_positions=8, n_embd=4, n_layer=1, n_head=2))  # 320 numbers


def small_loss(lm=SMALL, *, seed=0):
    tokens = np.random.default_rng(seed).integers(0, lm.vocab_size, size=(2, 6))
    return landscape.next_token_loss(lm, jnp.asarray(tokens))


def test_the_product_is_that_of_the_matrix(exact_quadratic):
    vector = jax.tree.map(lambda p: jnp.cos(p) + 1, exact_quadratic.params)
    found = landscape.hessian_vector_product(exact_quadratic.loss, exact_quadratic.params, vector)
    np.testing.assert_allclose(flat(found), exact_quadratic.matrix @ flat(vector), rtol=1e-12)
    curved = flat(vector) @ exact_quadratic.matrix @ flat(vector)
    np.testing.assert_allclose(
        landscape.curvature(exact_quadratic.loss, exact_quadratic.params, vector), curved, rtol=1e-12
    )
    gradient = exact_quadratic.matrix @ flat(exact_quadratic.params) + exact_quadratic.linear
    np.testing.assert_allclose(
        landscape.slope(exact_quadratic.loss, exact_quadratic.params, vector), gradient @ flat(vector), rtol=1e-12
    )


def check_second_difference(loss, params, direction, *, spacing, tolerance):
    section = landscape.loss_section(loss, params, direction, landscape.axis(4 * spacing, 9))
    exact = landscape.curvature(loss, params, direction)
    assert abs(landscape.second_difference(section, spacing) / exact - 1) < tolerance


def moderate(dtype):
    return jax.tree.map(lambda p: 0.5 * p, random_params(TINY["gpt2"], dtype=dtype)), small_loss(TINY["gpt2"])


@pytest.mark.parametrize("scale", ["parameter", "filter", "none"])
def test_second_differences_of_the_surface_are_the_curvature_in_float64(scale):
    with jax.enable_x64(True):
        params, loss = moderate(jnp.float64)
        for direction in landscape.random_directions(params, jax.random.key(1), scale=scale):
            direction = landscape.rescaled(direction, landscape.norm(params))
            check_second_difference(loss, params, direction, spacing=0.004, tolerance=1e-8)


def test_second_differences_of_the_surface_are_the_curvature_in_float32():
    """Along the gradient: where the curvature is next to nothing, rounding is all that float32 leaves of it."""
    params, loss = moderate(jnp.float32)
    direction = landscape.rescaled(jax.jit(jax.grad(loss))(params), 1.0)
    check_second_difference(loss, params, direction, spacing=0.06, tolerance=1e-3)


def test_second_difference_is_exact_for_polynomials_of_degree_nine():
    x = np.linspace(-1, 1, 9)
    for degree in range(10):
        wanted = 2.0 if degree == 2 else 0.0
        np.testing.assert_allclose(landscape.second_difference(x**degree, 0.25), wanted, atol=1e-12)
    error = landscape.second_difference(x**10, 0.25)
    np.testing.assert_allclose(abs(error), 3628800 * 0.25**8 / 3150, rtol=1e-9)  # f⁽¹⁰⁾ h⁸ / 3150


def test_lanczos_equals_the_dense_eigenvalues_of_a_small_gpt2():
    with jax.enable_x64(True):
        params, loss = random_params(SMALL, dtype=jnp.float64), small_loss()
        theta, unravel = ravel_pytree(params)

        @jax.jit
        def column(vector):
            return ravel_pytree(landscape.hessian_vector_product(loss, params, unravel(vector)))[0]

        dense = np.stack([np.asarray(column(vector)) for vector in jnp.eye(theta.size)])
        np.testing.assert_allclose(dense, dense.T, atol=1e-12)
        values, vectors = np.linalg.eigh(dense)
        found = landscape.top_eigenpairs(
            loss, params, jax.random.key(0), count=4, max_iterations=theta.size, tolerance=1e-10
        )
        np.testing.assert_allclose(found.values, values[::-1][:4], rtol=1e-9)
        for i, vector in enumerate(found.vectors):
            np.testing.assert_allclose(abs(flat(vector) @ vectors[:, -1 - i]), 1, rtol=1e-8)
            error = dense @ flat(vector) - found.values[i] * flat(vector)
            assert np.linalg.norm(error) <= found.residuals[i] + 1e-9
        assert found.smallest >= values[0] - 1e-9
        assert found.iterations < theta.size


def test_lanczos_equals_the_dense_eigenvalues_of_a_perceptron_in_float32():
    rng = np.random.default_rng(0)
    inputs, outputs = (jnp.asarray(rng.normal(size=(20, n)), jnp.float32) for n in (4, 2))
    sizes = {"first": (4, 6), "second": (6, 2)}
    params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}

    def loss(params):
        return jnp.square(jnp.tanh(inputs @ params["first"]) @ params["second"] - outputs).mean()

    theta, unravel = ravel_pytree(params)
    dense = np.asarray(jax.jit(jax.hessian(lambda theta: loss(unravel(theta))))(theta), np.float64)
    values = np.linalg.eigvalsh(dense)
    assert values[0] < 0 < values[-1]  # not convex
    found = landscape.top_eigenpairs(loss, params, jax.random.key(0), count=3, max_iterations=25)
    np.testing.assert_allclose(found.values, values[::-1][:3], rtol=1e-4)
    basis = np.stack([flat(vector) for vector in found.vectors])
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=3e-7)
    assert (found.residuals <= 1e-3 * np.abs(values).max()).all()


def test_residuals_are_those_of_the_pairs_also_when_iterations_were_few():
    spectrum = jnp.concatenate([jnp.asarray([10.0]), jnp.linspace(0, 0.002, 999)])

    def loss(params):
        return 0.5 * (spectrum * params["w"] ** 2).sum()

    params = {"w": jnp.ones(1000)}
    found = landscape.top_eigenpairs(loss, params, jax.random.key(0), max_iterations=8, tolerance=1e-9)
    for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        true = np.linalg.norm((np.asarray(spectrum, np.float64) - value) * np.asarray(vector["w"], np.float64))
        np.testing.assert_allclose(residual, true, rtol=0.1, atol=2e-6)
    assert found.residuals[1] > 1e-5  # not converged, and said so


def test_lanczos_with_few_vectors_restarts_and_finds_the_same():
    with jax.enable_x64(True):
        spectrum = jnp.concatenate([jnp.linspace(-3.0, 1.0, 200), jnp.asarray([2.0, 2.5, 4.0])])

        def loss(params):
            return 0.5 * (spectrum * params["w"] ** 2).sum()

        find = functools.partial(
            landscape.top_eigenpairs, loss, {"w": jnp.ones(203)}, jax.random.key(0), max_iterations=200, tolerance=1e-9
        )
        every, few, fewest = find(), find(vectors=8), find(vectors=3)
        for found in (every, few, fewest):
            np.testing.assert_allclose(found.values, [4.0, 2.5], rtol=1e-9)
            for value, vector, residual in zip(found.values, found.vectors, found.residuals, strict=True):
                true = np.linalg.norm((np.asarray(spectrum) - value) * flat(vector))
                np.testing.assert_allclose(true, residual, atol=1e-10)
            assert found.converged.all() and found.smallest >= -3 - 1e-9
        assert every.iterations < few.iterations < fewest.iterations < 200


def test_what_has_not_converged_says_so():
    spectrum = jnp.concatenate([jnp.asarray([10.0]), jnp.linspace(0, 0.002, 999)])
    find = functools.partial(
        landscape.top_eigenpairs, lambda p: 0.5 * (spectrum * p["w"] ** 2).sum(), {"w": jnp.ones(1000)}
    )
    found = find(jax.random.key(0), max_iterations=8, tolerance=1e-7)
    assert found.converged.tolist() == [True, False]
    assert re.fullmatch(
        r"Eigenpairs\(10 \(residual \S+\), 0.00\d+ \(not converged, residual \S+\); 8 iterations\)", repr(found)
    )
    assert find(jax.random.key(0), tolerance=1e-3).converged.all()


def test_iterations_that_do_not_fit_into_memory_are_refused_with_what_does(quadratic, monkeypatch):
    """17 numbers: 68 bytes a vector; beside the basis some vectors and the program's own memory."""
    find = functools.partial(landscape.top_eigenpairs, quadratic.loss, quadratic.params, jax.random.key(0))
    monkeypatch.setattr(runtime, "available_memory", lambda: 0)
    with pytest.raises(ValueError, match=r"17 vectors of 17 numbers need .* bytes .*, and 0 bytes .*: not even 3 of"):
        find()
    with pytest.raises(ValueError) as error:
        find()
    needed = int(re.search(r"need (\d+) bytes", str(error.value))[1])
    monkeypatch.setattr(runtime, "available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=f"and {needed - 1} bytes") as error:
        find()
    fitting = int(re.search(r"with vectors=(\d+) they fit", str(error.value))[1])
    assert 3 <= fitting < 17 and find(vectors=fitting).iterations > 0
    monkeypatch.setattr(runtime, "available_memory", lambda: needed)
    assert find().iterations == 17


def test_the_available_memory_is_known_where_the_system_tells_it():
    if Path("/proc/meminfo").is_file() and jax.default_backend() == "cpu":
        assert 2**20 < runtime.available_memory() < 2**50


def test_bfloat16_parameters_are_widened():
    params = random_params(SMALL, dtype=jnp.bfloat16)
    found = landscape.top_eigenpairs(small_loss(), params, jax.random.key(0), max_iterations=6)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    wanted = landscape.top_eigenpairs(small_loss(), wide, jax.random.key(0), max_iterations=6)
    np.testing.assert_allclose(found.values, wanted.values, rtol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(found.vectors)} == {jnp.dtype(jnp.float32)}
    curvatures = [landscape.curvature(small_loss(), each, found.vectors[0]) for each in (params, wide)]
    assert curvatures[0] == curvatures[1]


def test_when_the_space_is_exhausted_a_new_vector_finds_the_multiple_eigenvalues():
    with jax.enable_x64(True):
        spectrum = jnp.asarray([5.0, 5.0, 5.0, 2.0, -1.0, -1.0])
        found = landscape.top_eigenpairs(
            lambda p: 0.5 * (spectrum * p["w"] ** 2).sum(),
            {"w": jnp.ones(6)},
            jax.random.key(0),
            count=6,
            tolerance=1e-12,
        )
        np.testing.assert_allclose(found.values, spectrum, atol=1e-10)
        basis = np.stack([flat(vector) for vector in found.vectors])
        np.testing.assert_allclose(basis @ basis.T, np.eye(6), atol=1e-10)
        np.testing.assert_allclose(found.smallest, -1, atol=1e-10)


def test_wrong_inputs_are_named(quadratic):
    loss, params = quadratic.loss, quadratic.params
    with pytest.raises(ValueError, match="vector must be a tree like params, but lacks gain"):
        landscape.hessian_vector_product(loss, params, {"dense": params["dense"]})
    for count in (0, 18):
        with pytest.raises(ValueError, match=r"count must lie in \[1, 17\]"):
            landscape.top_eigenpairs(loss, params, jax.random.key(0), count=count)
    with pytest.raises(ValueError, match="vectors must be at least 3, one more than count, but is 2"):
        landscape.top_eigenpairs(loss, params, jax.random.key(0), vectors=2)
    with pytest.raises(FloatingPointError, match="no finite curvature"):
        landscape.top_eigenpairs(lambda p: jnp.sqrt(jnp.abs(p["gain"] - p["gain"])), params, jax.random.key(0))
    for values, message in ((np.zeros(8), "odd number"), (np.zeros(7), "at least 9"), (np.full(9, np.inf), "finite")):
        with pytest.raises(ValueError, match=message):
            landscape.second_difference(values, 0.1)
    with pytest.raises(ValueError, match="spacing must be positive"):
        landscape.second_difference(np.zeros(9), 0.0)

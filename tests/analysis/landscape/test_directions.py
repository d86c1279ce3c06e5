import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxrl_llm import models
from jaxrl_llm.analysis import landscape
from tests.analysis.landscape.conftest import flat
from tests.conftest import TINY, random_params

pytestmark = pytest.mark.slow


def cosine64(first, second):
    first, second = flat(first), flat(second)
    return first @ second / np.linalg.norm(first) / np.linalg.norm(second)


def leaf_norms(tree):
    return np.asarray([np.linalg.norm(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


SHAPES = st.sampled_from([(), (1,), (3,), (1, 4), (4, 1), (2, 5), (3, 2, 2)])  # few: each is compiled


@settings(max_examples=25)
@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(0, 5), st.sampled_from(["parameter", "filter", "none"]))
def test_of_any_shapes_they_are_orthogonal_and_of_the_right_norm_or_refused(shapes, seed, scale):
    rng = np.random.default_rng(seed)
    params = {f"w{i}": {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for i, shape in enumerate(shapes)}
    try:
        first, second = landscape.random_directions(params, jax.random.key(seed), scale=scale)
    except ValueError as error:
        few = (
            sum(int(np.prod(shape)) for shape in shapes) < 2 or min(map(len, shapes)) < 2 or any(1 in s for s in shapes)
        )
        assert few and ("scale" in str(error) or "two numbers" in str(error))
        return
    assert abs(cosine64(first, second)) < 1e-6
    if scale == "parameter":
        for direction in (first, second):
            np.testing.assert_allclose(leaf_norms(direction), leaf_norms(params), rtol=1e-6)
    if scale == "filter":
        for name, leaf in params.items():
            leaf = leaf["kernel"]
            for direction in (first, second):
                found, wanted = (np.asarray(x, np.float64).reshape(-1, x.shape[-1] if x.ndim else 1)
                                 for x in (direction[name]["kernel"], leaf))  # fmt: skip
                wanted = np.linalg.norm(wanted, axis=0) if leaf.ndim > 1 else 0 * found[0]
                np.testing.assert_allclose(np.linalg.norm(found, axis=0), wanted, rtol=2e-6)


@pytest.mark.parametrize("scale", ["parameter", "filter", "none"])
def test_of_tiny_gpt2_they_are_orthogonal_over_all_parameters_together(scale):
    params = models.load("tiny-gpt2").params
    first, second = landscape.random_directions(params, jax.random.key(0), scale=scale)
    assert abs(cosine64(first, second)) < 1e-6
    assert abs(float(landscape.cosine(first, second))) < 1e-6
    if scale == "parameter":
        np.testing.assert_allclose(leaf_norms(first), leaf_norms(params), rtol=1e-6)
        np.testing.assert_allclose(leaf_norms(second), leaf_norms(params), rtol=1e-6)
    if scale == "filter":  # of a kernel the columns, of an embedding the rows; biases and norms stay
        for direction in (first, second):
            for name, axis in ((("h", 0, "attn", "c_attn", "kernel"), 0), (("wte", "embedding"), 1)):
                found, wanted = (
                    np.linalg.norm(np.asarray(leaf_at(tree, name), np.float64), axis=axis)
                    for tree in (direction, params)
                )
                np.testing.assert_allclose(found, wanted, rtol=1e-5)
            assert not np.any(leaf_at(direction, ("h", 0, "ln_1", "scale")))
            assert not np.any(leaf_at(direction, ("h", 0, "attn", "c_attn", "bias")))


def leaf_at(tree, path):
    for entry in path:
        tree = tree[entry]
    return tree


def test_single_numbers_are_made_up_for_by_one_cosine_elsewhere():
    params = {"gain": jnp.float32(3.0), "weight": jnp.ones((4, 4), jnp.float32)}
    first, second = landscape.random_directions(params, jax.random.key(0))
    np.testing.assert_allclose(abs(first["gain"]), 3.0, rtol=1e-6)
    np.testing.assert_allclose(abs(second["gain"]), 3.0, rtol=1e-6)
    np.testing.assert_allclose(leaf_norms(second), leaf_norms(params), rtol=1e-6)
    within = float(first["weight"].reshape(-1) @ second["weight"].reshape(-1))
    np.testing.assert_allclose(within, -first["gain"] * second["gain"], rtol=1e-5)  # −S


def test_the_same_name_shape_and_key_give_the_same_draw():
    weight = jnp.ones((5, 3))
    alone = landscape.random_directions({"b": weight}, jax.random.key(3))[0]["b"]
    beside = landscape.random_directions({"a": jnp.ones(7), "b": weight}, jax.random.key(3))[0]["b"]
    np.testing.assert_array_equal(alone, beside)
    other = landscape.random_directions({"b": weight}, jax.random.key(4))[0]["b"]
    assert not np.allclose(alone, other)


def test_directions_of_bfloat16_parameters_are_float32():
    params = random_params(TINY["gpt2"], dtype=jnp.bfloat16)
    first, second = landscape.random_directions(params, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((first, second))} == {jnp.dtype(jnp.float32)}
    assert abs(cosine64(first, second)) < 1e-6


def test_trees_of_tuples_lists_and_plain_numbers():
    params = {"layers": (jnp.ones((3, 4)), [jnp.ones((4, 2)), 2.0])}
    first, second = landscape.random_directions(params, jax.random.key(0))
    assert jax.tree.structure(first) == jax.tree.structure(second) == jax.tree.structure(params)
    assert abs(cosine64(first, second)) < 1e-6
    np.testing.assert_allclose(leaf_norms(second), leaf_norms(params), rtol=1e-6)


def test_a_parameter_of_norm_zero_stays_where_it_is():
    params = {"bias": jnp.zeros(4), "kernel": jnp.ones((3, 4))}
    for scale in ("parameter", "filter"):
        for direction in landscape.random_directions(params, jax.random.key(0), scale=scale):
            np.testing.assert_array_equal(direction["bias"], 0)
            assert np.isfinite(direction["kernel"]).all() and np.any(direction["kernel"])
    unscaled = landscape.random_directions(params, jax.random.key(0), scale="none")
    assert all(np.any(direction["bias"]) for direction in unscaled)


@pytest.mark.parametrize(
    ("params", "scale", "message"),
    [
        ({"w": jnp.zeros((2, 2))}, "parameter", "norm 0"),
        ({"w": jnp.ones(5)}, "filter", "norm 0"),
        ({"a": jnp.ones(()), "b": 2 * jnp.ones(())}, "parameter", "single numbers"),
        ({"a": jnp.ones(())}, "none", "two numbers"),
        ({}, "parameter", "must have numbers"),
        ({"w": jnp.ones(3, jnp.int32)}, "parameter", "w is int32"),
        ({"layer": {"w": jnp.asarray([1.0, jnp.nan])}}, "parameter", "layer/w is not"),
        ({"w": jnp.full(9, 1e30)}, "parameter", "in their dtype's range, but overflows"),
        ({"w": jnp.ones(3)}, "layer", "scale must be one of parameter, filter, none, but is 'layer'"),
    ],
)
def test_wrong_inputs_are_named(params, scale, message):
    with pytest.raises(ValueError, match=message):
        landscape.random_directions(params, jax.random.key(0), scale=scale)


# Directions that given parameters span ------------------------------------------------------------------------------


def test_interpolation_reaches_the_two_trees(quadratic):
    rng = np.random.default_rng(1)
    first, second = (jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape), p.dtype), quadratic.params)
                     for _ in range(2))  # fmt: skip
    directions = landscape.interpolation_directions(quadratic.params, first, second)
    ends = landscape.loss_surface(quadratic.loss, quadratic.params, directions, [0, 1], [0, 1], progress=False)
    wanted = [quadratic.exactly(each) for each in (quadratic.params, second, first)]
    np.testing.assert_allclose([ends[0, 0], ends[0, 1], ends[1, 0]], wanted, rtol=1e-5)


def test_principal_directions_are_those_of_a_singular_value_decomposition(quadratic):
    rng, origin = np.random.default_rng(2), quadratic.params
    checkpoints = [
        jax.tree.map(lambda p, t=t: p + jnp.asarray((8 - t) * 0.3 + rng.normal(size=p.shape), p.dtype), origin)
        for t in range(7)
    ]
    found = landscape.principal_directions([*checkpoints, origin], origin)
    differences = np.stack([flat(each) - flat(origin) for each in [*checkpoints, origin]])
    _, singular, axes = np.linalg.svd(differences)
    np.testing.assert_allclose(found.explained, singular[:2] ** 2 / (singular**2).sum(), rtol=1e-4)
    for i, direction in enumerate(found.directions):
        unit = flat(direction) / np.linalg.norm(flat(direction))
        np.testing.assert_allclose(abs(unit @ axes[i]), 1, rtol=1e-5)
    assert abs(cosine64(*found.directions)) < 1e-5
    np.testing.assert_allclose(np.abs(found.coordinates).max(axis=0), 1, rtol=1e-5)
    assert (found.coordinates[0] > 0).all()
    for checkpoint, place in zip(checkpoints, found.coordinates, strict=False):
        np.testing.assert_allclose(landscape.coordinates(checkpoint, origin, found.directions), place, atol=1e-4)
    np.testing.assert_allclose(found.coordinates[-1], 0, atol=1e-6)


def test_principal_directions_are_orthogonal_also_when_the_second_is_short():
    rng = np.random.default_rng(0)
    along, across = (jnp.asarray(rng.normal(size=1000), jnp.float32) for _ in range(2))
    checkpoints = [{"w": t * along + 0.006 * np.sin(9 * t) * across} for t in np.linspace(0.1, 1, 10)]
    found = landscape.principal_directions(checkpoints, {"w": jnp.zeros(1000)})
    assert abs(cosine64(*found.directions)) < 1e-6
    for checkpoint, place in zip(checkpoints, found.coordinates, strict=True):
        at = landscape.coordinates(checkpoint, {"w": jnp.zeros(1000)}, found.directions)
        np.testing.assert_allclose(at, place, atol=1e-5)


def test_coordinates_in_a_slanted_plane(quadratic):
    params = quadratic.params
    first, second = landscape.random_directions(params, jax.random.key(0))
    slanted = (first, jax.tree.map(lambda a, b: a + 0.5 * b, first, second))
    point = jax.tree.map(lambda p, a, b: p + 0.3 * a - 0.7 * b, params, *slanted)
    np.testing.assert_allclose(landscape.coordinates(point, params, slanted), [0.3, -0.7], rtol=1e-4)


def test_what_spans_no_plane_is_refused(quadratic):
    params = quadratic.params
    moved = [jax.tree.map(lambda p, t=t: p + t, params) for t in (1.0, 2.0, 3.0)]
    with pytest.raises(ValueError, match="lie on a line"):
        landscape.principal_directions(moved, params)
    with pytest.raises(ValueError, match="lie on a line"):
        landscape.principal_directions(moved[:1], params)
    direction = landscape.random_directions(params, jax.random.key(0))[0]
    with pytest.raises(ValueError, match="must span a plane"):
        landscape.coordinates(moved[0], params, (direction, jax.tree.map(lambda d: 2 * d, direction)))
    with pytest.raises(ValueError, match="norm 0"):
        landscape.rescaled(jax.tree.map(jnp.zeros_like, params), 1.0)


def test_a_tree_that_does_not_match_is_named(quadratic):
    params = quadratic.params
    wrong_shape = params | {"gain": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"second must be a tree like params: gain must be \[\], but is \[2\]"):
        landscape.interpolation_directions(params, params, wrong_shape)
    with pytest.raises(ValueError, match="first must be a tree like params, but lacks gain, has bias besides"):
        landscape.interpolation_directions(params, {"dense": params["dense"], "bias": params["gain"]}, params)

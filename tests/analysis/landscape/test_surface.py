import dataclasses
import json
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.analysis import landscape
from jaxrl_llm.analysis.landscape import surface as surface_module
from tests.analysis.landscape.conftest import flat
from tests.conftest import TINY, random_params


def surface_of(loss, params, directions, alphas, betas, **options):
    return landscape.loss_surface(loss, params, directions, alphas, betas, **{"progress": False} | options)


def two_directions(params):
    """Of random numbers: drawn by numpy, they need no program."""
    rng = np.random.default_rng(0)
    dtype = jnp.promote_types(jnp.float32, jax.tree.leaves(params)[0].dtype)
    return tuple(
        jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), dtype), params) for _ in range(2)
    )


@pytest.fixture(scope="module")
def small():
    """The next-token loss of a small GPT-2 on a few tokens, and two directions."""
    lm = TINY["gpt2"]
    params = random_params(lm)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, lm.vocab_size, size=(2, 9)))
    return landscape.next_token_loss(lm, tokens), params, two_directions(params)


def exact_surface(quadratic, directions, alphas, betas):
    """f + α g·d1 + β g·d2 + ½ (α² d1ᵀAd1 + 2αβ d1ᵀAd2 + β² d2ᵀAd2), in float64."""
    theta, first, second = flat(quadratic.params), *(flat(direction) for direction in directions)
    gradient = quadratic.matrix @ theta + quadratic.linear
    alpha, beta = np.meshgrid(alphas, betas, indexing="ij")
    curved = alpha**2 * (first @ quadratic.matrix @ first) + beta**2 * (second @ quadratic.matrix @ second)
    curved += 2 * alpha * beta * (first @ quadratic.matrix @ second)
    return quadratic.exactly(quadratic.params) + alpha * (gradient @ first) + beta * (gradient @ second) + curved / 2


def test_of_a_quadratic_loss_the_surface_is_the_exact_quadratic(exact_quadratic):
    params, alphas, betas = exact_quadratic.params, landscape.axis(1.0, 7), landscape.axis(2.0, 5)
    directions = two_directions(params)
    found = surface_of(exact_quadratic.loss, params, directions, alphas, betas)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, exact_surface(exact_quadratic, directions, alphas, betas), rtol=1e-12, atol=1e-12)


def test_in_float32_too(quadratic):
    alphas, betas = landscape.axis(1.0, 5), landscape.axis(1.0, 4)
    directions = two_directions(quadratic.params)
    found = surface_of(quadratic.loss, quadratic.params, directions, alphas, betas)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact_surface(quadratic, directions, alphas, betas), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("time", [4, 16])
@pytest.mark.slow
def test_the_centre_is_the_loss_bit_for_bit(small, time):
    """Of a surface, however large its blocks, and of a section."""
    lm, (_, params, directions), axis = TINY["gpt2"], small, landscape.axis(1, 3)
    tokens = jnp.asarray(np.random.default_rng(time).integers(0, lm.vocab_size, size=(1, time)))
    loss = landscape.next_token_loss(lm, tokens)
    centre = jax.jit(loss)(params)
    for budget in (None, 10**8):
        found = surface_of(loss, params, directions, axis, axis, memory_budget=budget)
        assert found[1, 1] == centre
        assert np.ptp(found) > 0.01  # the directions lead somewhere
    assert landscape.loss_section(loss, params, directions[0], axis)[1] == centre


def test_points_are_those_of_plain_evaluation(small):
    loss, params, directions = small
    alphas, betas = [-0.5, 0.0, 0.25], [-1.0, 0.0, 0.5, 0.75]
    found = surface_of(loss, params, directions, alphas, betas)
    plain = jax.jit(lambda x, y: loss(jax.tree.map(lambda p, a, b: p + x * a + y * b, params, *directions)))
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            np.testing.assert_allclose(found[i, j], plain(alpha, beta), rtol=2e-6)


def test_blocks_and_meshes_agree(small):
    loss, params, directions = small
    grid = landscape.axis(1, 3), landscape.axis(1, 5)
    wanted = surface_of(loss, params, directions, *grid)
    line = surface_module._line.lower(loss, params, params, directions[1], jnp.zeros(1), block=1).compile()
    budget = 2 * line.memory_analysis().temp_size_in_bytes
    assert surface_module._block_size(loss, params, directions[1], budget, most=5) == 2  # the last block is filled up
    assert surface_module._block_size(loss, params, directions[1], 10 * budget, most=21) == 11  # not 20 and 1
    np.testing.assert_allclose(surface_of(loss, params, directions, *grid, memory_budget=budget), wanted, rtol=2e-6)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), "grid")
    np.testing.assert_allclose(surface_of(loss, params, directions, *grid, mesh=mesh), wanted, rtol=2e-6)


MESH = """
import jax, jax.numpy as jnp, numpy as np
from jaxrl_llm.analysis import landscape
from jaxrl_llm.tabular import TabularLM
assert jax.device_count() == 8
lm = TabularLM(vocab_size=3, horizon=4)
params = lm.init(jax.random.key(0))
loss = landscape.next_token_loss(lm, jnp.asarray([[0, 1, 2, 1]]))
directions = landscape.random_directions(params, jax.random.key(1))
grid = landscape.axis(1, 3), landscape.axis(1, 21)
alone = landscape.loss_surface(loss, params, directions, *grid, progress=False)
for shape, names in (((8,), ("a",)), ((2, 4), ("a", "b"))):
    mesh = jax.make_mesh(shape, names)
    for budget in (None, 10**6):
        options = {"mesh": mesh, "progress": False, "memory_budget": budget}
        spread = landscape.loss_surface(loss, params, directions, *grid, **options)
        np.testing.assert_allclose(spread, alone, rtol=1e-6)
assert np.ptp(alone) > 0.1 and alone[1, 10] == jax.jit(loss)(params)
points = jnp.zeros(24)
whole = jax.sharding.NamedSharding(mesh, jax.P())
split = jax.device_put(points, jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names)))
params, direction = jax.device_put((params, directions[1]), whole)
program = landscape.surface._line.lower(loss, params, params, direction, split, block=1, mesh=mesh).compile()
assert "num_partitions=8" in program.as_text()[:2000], program.as_text()[:2000]
print("equal on 8 devices")
"""


@pytest.mark.slow
def test_under_a_mesh_of_eight_devices_the_surface_is_the_same():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "equal on 8 devices\n"


def test_the_block_follows_from_the_budget(small):
    loss, params, (first, second) = small
    line = surface_module._line.lower(loss, params, params, second, jnp.zeros(1), block=1).compile()
    need = line.memory_analysis().temp_size_in_bytes
    assert surface_module._block_size(loss, params, second, 5 * need, most=100) == 5
    assert surface_module._block_size(loss, params, second, 500 * need, most=21) == 21
    with pytest.raises(ValueError, match=f"at least {need} bytes"):
        surface_of(loss, params, (first, second), [0.0], [0.0], memory_budget=need - 1)
    with pytest.raises(ValueError, match="positive number of bytes"):
        surface_of(loss, params, (first, second), [0.0], [0.0], memory_budget=0)


def test_the_parameters_are_untouched_and_the_loss_compiled_once(small):
    loss, params, directions = small
    before = jax.tree.map(np.array, params)
    traces = []

    def counted(params):
        traces.append(1)
        return loss(params)

    first = surface_of(counted, params, directions, landscape.axis(1, 9), landscape.axis(1, 9))
    count = len(traces)
    again = surface_of(counted, params, directions, landscape.axis(0.5, 9), landscape.axis(0.5, 9))
    assert len(traces) == count
    assert not np.array_equal(first, again)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_next_token_losses_of_the_same_tokens_share_a_program(small):
    loss, params, directions = small
    lm, (tokens, mask, _) = loss.lm, loss.sequences
    surface_of(loss, params, directions, [0.5], landscape.axis(1, 9))
    programs, equal = surface_module._line._cache_size(), landscape.next_token_loss(lm, np.array(tokens))
    assert equal == loss and hash(equal) == hash(loss)
    surface_of(equal, params, directions, [-0.5], landscape.axis(2, 9))
    assert surface_module._line._cache_size() == programs
    assert loss != landscape.next_token_loss(lm, tokens, mask.at[0, -1].set(False))
    assert loss != landscape.next_token_loss(lm, tokens.at[0, -1].add(1) % lm.vocab_size)
    assert loss != landscape.next_token_loss(TINY["llama"], tokens)


def test_bfloat16_parameters_stay_bfloat16():
    lm = TINY["gpt2"]
    params = random_params(lm, dtype=jnp.bfloat16)
    loss = landscape.next_token_loss(lm, jnp.asarray([[1, 2, 3, 4]]))
    seen = []

    def watched(params):
        seen.append({leaf.dtype for leaf in jax.tree.leaves(params)})
        return loss(params)

    directions = two_directions(params)
    found = surface_of(watched, params, directions, [-1, 0, 1], [0])
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in seen)
    assert found[1, 0] == jax.jit(loss)(params)


def test_a_section_is_a_row_of_the_surface(small):
    loss, params, directions = small
    alphas = landscape.axis(0.5, 9)
    section = landscape.loss_section(loss, params, directions[0], alphas)
    np.testing.assert_allclose(section, surface_of(loss, params, directions, alphas, [0.0])[:, 0], rtol=2e-6)
    assert section[4] == jax.jit(loss)(params)


@pytest.mark.parametrize("points", [1, 20, 21, 441])
def test_an_axis_is_exactly_symmetric_and_an_odd_one_has_the_origin(points):
    axis = landscape.axis(0.7, points)
    np.testing.assert_array_equal(axis, -axis[::-1])
    assert (0.0 in axis) == (points % 2 == 1)
    assert points == 1 or axis[-1] == 0.7


# Holes --------------------------------------------------------------------------------------------------------------


def broken_loss(params):
    theta = params["w"]
    return jnp.where(theta[0] > 0.75, jnp.nan, jnp.where(theta[1] < -0.75, jnp.inf, (theta**2).sum()))


def test_a_loss_that_is_not_finite_is_a_hole_and_reported():
    params = {"w": jnp.zeros(2)}
    directions = ({"w": jnp.asarray([1.0, 0.0])}, {"w": jnp.asarray([0.0, 1.0])})
    grid = landscape.axis(1, 5)
    with pytest.warns(landscape.LossHole, match=r"not finite at 9 of 25 points, first at \(-1, -1\)"):
        surface = landscape.surface_of(broken_loss, params, directions, grid, grid, progress=False)
    found, described = surface.loss, surface.as_dict()
    assert np.isnan(found[4]).all() and np.isinf(found[:4, 0]).all()
    assert np.isfinite(found[:4, 1:]).all()
    assert described["holes"] == 9 and described["loss"][4] == [None] * 5
    assert described["minimum"] == 0 and described["maximum"] == 2.0
    json.dumps(described, allow_nan=False)


def test_no_hole_no_warning(small):
    loss, params, directions = small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surface_of(loss, params, directions, [0.0, 0.5], [0.0])


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (np.full((2, 3), np.nan), "none of the 6 losses is finite"),
        (np.zeros((3, 2)), r"loss must be \[2, 3\], but is \[3, 2\]"),
    ],
)
def test_a_surface_of_holes_alone_or_of_another_shape_is_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        landscape.Surface("", "nats", np.arange(2), np.arange(3), losses, centre=0.0, cosine=0.0)


@pytest.mark.parametrize(("points", "on_grid"), [(5, True), (4, False)])
def test_a_surface_computes_the_numbers_that_belong_to_it(quadratic, points, on_grid):
    directions, axis = landscape.random_directions(quadratic.params, jax.random.key(0)), landscape.axis(1, points)
    options = {"title": "a bowl", "unit": "nats", "progress": False}
    found = landscape.surface_of(quadratic.loss, quadratic.params, directions, axis, axis, **options)
    assert (found.title, found.unit, found.sharpness) == ("a bowl", "nats", None)
    np.testing.assert_array_equal(
        found.loss, surface_of(quadratic.loss, quadratic.params, directions, axis, axis), strict=True
    )
    assert found.centre == jax.jit(quadratic.loss)(quadratic.params)
    assert found.cosine == landscape.cosine(*directions)
    described = found.as_dict()
    assert described["centre_on_grid"] == on_grid and "sharpness" not in described
    assert (described["minimum"], described["maximum"]) == (found.loss.min(), found.loss.max())
    assert dataclasses.replace(found, sharpness=2.0).as_dict()["sharpness"] == 2.0


# Checkpoints --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_a_grid_that_was_cut_off_goes_on_and_ends_equal(small, tmp_path, monkeypatch):
    loss, params, directions = small
    grid, path = (landscape.axis(1, 5), landscape.axis(1, 3)), tmp_path / "deep" / "surface.json"
    wanted = surface_of(loss, params, directions, *grid)
    calls, evaluate = [], surface_module._losses_along

    def cut_off(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return evaluate(*args, **options)

    monkeypatch.setattr(surface_module, "_losses_along", cut_off)
    with pytest.raises(Stop):
        surface_of(loss, params, directions, *grid, checkpoint=path)
    assert len(json.loads(path.read_text())["losses"]) == 2
    found = surface_of(loss, params, directions, *grid, checkpoint=path)
    assert len(calls) == 6  # two rows before, the cut, three after
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(surface_of(loss, params, directions, *grid, checkpoint=path), wanted)
    assert len(calls) == 6
    assert [each.name for each in path.parent.iterdir()] == ["surface.json"]


def test_holes_survive_a_checkpoint(tmp_path):
    params, grid = {"w": jnp.zeros(2)}, landscape.axis(1, 5)
    directions = ({"w": jnp.asarray([1.0, 0.0])}, {"w": jnp.asarray([0.0, 1.0])})
    for _ in range(2):
        with pytest.warns(landscape.LossHole, match="9 of 25"):
            surface_of(broken_loss, params, directions, grid, grid, checkpoint=tmp_path / "surface.json")


def test_a_checkpoint_tells_losses_apart_that_agree_at_the_parameters(small, tmp_path):
    """Every loss of DPO is log 2 around its reference."""
    _, params, directions = small
    width, path = params["wte"]["embedding"], tmp_path / "surface.json"
    losses = [lambda p, s=s: s * jnp.square(p["wte"]["embedding"] - width).sum() for s in (1.0, 2.0)]
    surface_of(losses[0], params, directions, [0.0, 1.0], [0.0], checkpoint=path)
    with pytest.raises(ValueError, match="another surface"):
        surface_of(losses[1], params, directions, [0.0, 1.0], [0.0], checkpoint=path)


def test_the_checkpoint_of_another_surface_is_refused(small, tmp_path):
    loss, params, directions = small
    path = tmp_path / "surface.json"
    surface_of(loss, params, directions, [0.0, 1.0], [0.0], checkpoint=path)
    others = [
        (loss, params, directions, [0.0, 0.5], [0.0]),
        (loss, params, directions[::-1], [0.0, 1.0], [0.0]),
        (loss, jax.tree.map(lambda p: 2 * p, params), directions, [0.0, 1.0], [0.0]),
        (lambda params: 2 * loss(params), params, directions, [0.0, 1.0], [0.0]),
    ]
    for other in others:
        with pytest.raises(ValueError, match="another surface"):
            surface_of(*other, checkpoint=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a checkpoint of a loss surface"):
        surface_of(loss, params, directions, [0.0, 1.0], [0.0], checkpoint=path)


# Wrong inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alphas", "betas", "message"),
    [
        ([], [0.0], r"alphas must be a list of at least one number, all finite, but has the shape \[0\]"),
        ([0.0], [], "betas must be"),
        ([[0.0]], [0.0], r"shape \[1, 1\]"),
        ([0.0, float("nan")], [0.0], "all finite, but has others"),
    ],
)
def test_an_empty_or_broken_grid_is_refused(small, alphas, betas, message):
    with pytest.raises(ValueError, match=message):
        surface_of(*small, alphas, betas)


def test_trees_that_do_not_match_are_refused(small):
    loss, params, (first, second) = small
    wrong = second | {"ln_f": {"scale": second["ln_f"]["scale"]}}
    with pytest.raises(ValueError, match="direction 1 must be a tree like params, but lacks ln_f/bias"):
        surface_of(loss, params, (first, wrong), [0.0], [0.0])
    shapes = jax.tree.map(lambda leaf: leaf[None], second)
    with pytest.raises(ValueError, match=r"direction 1 must be a tree like params: .* must be .* but is"):
        surface_of(loss, params, (first, shapes), [0.0], [0.0])
    with pytest.raises(ValueError, match="directions must be two trees, but are 1"):
        surface_of(loss, params, (first,), [0.0], [0.0])
    infinite = jax.tree.map(lambda leaf: leaf * jnp.inf, second)
    with pytest.raises(ValueError, match="direction 1 must be finite"):
        surface_of(loss, params, (first, infinite), [0.0], [0.0])


def test_a_loss_that_is_no_scalar_is_refused(small):
    _, params, directions = small
    for wrong in (lambda p: p["wte"]["embedding"][0], lambda p: jnp.int32(1), lambda p: (jnp.float32(1), 2)):
        with pytest.raises(ValueError, match="must return one floating number"):
            surface_of(wrong, params, directions, [0.0], [0.0])


@pytest.mark.parametrize(("radius", "points"), [(1.0, 0), (0.0, 3), (float("inf"), 3), (1.0, 2.5)])
def test_an_axis_of_nothing_is_refused(radius, points):
    with pytest.raises(ValueError, match=r"integer of at least 1|positive and finite"):
        landscape.axis(radius, points)

"""LoRA: nothing changes at the start, merging is the product, and the files are PEFT's."""

import functools
import json

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.training import lora, steps
from jaxrl_llm.training.supervised import sft_loss
from tests.conftest import TINY, random_params
from tests.training.test_steps import answers

KEY = jax.random.key(0)
close = functools.partial(np.testing.assert_allclose, atol=1e-5)


def drawn(given):
    """An adapter with B of its own, as after training."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(given.init, KEY)
    return jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
def test_merging_adds_the_scaled_product(name):
    lm, params = TINY[name], random_params(TINY[name])
    given = lora.lora(lm, rank=2, alpha=6)
    merge, adapter = jax.jit(given.merge), drawn(given)
    jax.tree.map(np.testing.assert_array_equal, merge(params, jax.jit(given.init)(KEY)), params)
    merged = merge(params, adapter)
    block = ("h", 0, "attn", "c_attn") if name == "gpt2" else ("layers", 0, "self_attn", "q_proj")
    tensor = ".".join(map(str, block)) + ".weight"
    before, after = (
        functools.reduce(lambda node, entry: node[entry], block, each)["kernel"] for each in (params, merged)
    )
    close(after - before, 3 * np.asarray(adapter[tensor]["a"]) @ np.asarray(adapter[tensor]["b"]))
    changed = [path for path, new in jax.tree_util.tree_leaves_with_path(merged)]
    same = sum((new == old).all() for new, old in zip(*map(jax.tree.leaves, (merged, params)), strict=True))
    assert len(changed) - same == len(given.names) == (1 if name == "gpt2" else 2)


def test_training_moves_the_adapter_alone(gpt2):
    lm, params = gpt2
    given = lora.lora(lm, rank=2, targets=["c_attn", "c_fc"])
    optimizer = optax.adam(1e-2)
    step = steps.make_step(sft_loss(lm), optimizer, view=given.view(), microbatches=2)
    frozen = steps.Frozen(base=params)
    before, batch = jax.tree.map(np.array, params), answers(lm)
    state, losses = steps.initial_state(jax.jit(given.init)(KEY), optimizer, KEY), []
    for _ in range(30):
        state, metrics = step(state, batch, frozen)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert losses[-1] < losses[0] - 0.3 and set(state.params) == set(given.names)


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
def test_the_files_are_pefts_and_come_back(name, tmp_path):
    lm = TINY[name]
    given = lora.lora(lm, rank=3, alpha=5)
    adapter = drawn(given)
    lora.save(tmp_path, given, adapter, base="somewhere")
    again, found = lora.load(tmp_path, lm)
    assert (again.rank, again.alpha, again.targets) == (3, 5.0, given.targets)
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 3 and config["base_model_name_or_path"] == "somewhere"
    assert config["fan_in_fan_out"] == (name == "gpt2")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    module = "transformer.h.0.attn.c_attn" if name == "gpt2" else "model.layers.0.self_attn.q_proj"
    assert tensors[f"base_model.model.{module}.lora_A.weight"].shape == (3, 16)
    assert tensors[f"base_model.model.{module}.lora_B.weight"].shape == (48 if name == "gpt2" else 16, 3)


def test_what_does_not_fit_is_named(gpt2, tmp_path):
    lm, _ = gpt2
    with pytest.raises(ValueError, match="rank must be at least 1, but is 0"):
        lora.lora(lm, rank=0)
    with pytest.raises(ValueError, match="targets must be among c_attn, c_fc, c_proj, but are q_proj"):
        lora.lora(lm, targets=["q_proj"])
    given = lora.lora(lm, rank=2)
    with pytest.raises(ValueError, match=r"missing h\.0\.attn\.c_attn\.weight"):
        given.merge(random_params(lm), {})
    with pytest.raises(ValueError, match="the adapter is of another model or rank"):
        given.merge(random_params(lm), lora.lora(lm, rank=3).init(KEY))
    with pytest.raises(FileNotFoundError, match="has no adapter_config"):
        lora.load(tmp_path, lm)
    lora.save(tmp_path, given, given.init(KEY))
    with pytest.raises(ValueError, match="targets must be among"):
        lora.load(tmp_path, TINY["llama"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"alpha_pattern": {"c_attn": 4}}, {"rank_pattern": {"c_attn": 1}}, {"bias": "all"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"one rank and one alpha for all layers, but sets {min(change)}"):
            lora.load(tmp_path, lm)

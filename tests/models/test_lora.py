"""LoRA: nothing changes at the start, merging is the product, and the files are PEFT's."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxrl_llm as jl
from jaxrl_llm import models
from jaxrl_llm.models import Config, Decoder, lora
from jaxrl_llm.models.layers import Adapted, Linear
from jaxrl_llm.training import steps
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
    assert again == given
    jax.tree.map(np.testing.assert_array_equal, found, adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 3 and config["base_model_name_or_path"] == "somewhere"
    assert config["target_modules"] == (["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"])
    assert config["fan_in_fan_out"] == (name == "gpt2")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    module = "transformer.h.0.attn.c_attn" if name == "gpt2" else "model.layers.0.self_attn.q_proj"
    assert tensors[f"base_model.model.{module}.lora_A.weight"].shape == (3, 16)
    assert tensors[f"base_model.model.{module}.lora_B.weight"].shape == (48 if name == "gpt2" else 16, 3)


def test_each_layer_may_have_its_own_rank_and_scale(tmp_path):
    lm = TINY["llama"]
    modules = [("o_proj", 2, 4.0), ("q_proj", 4, 4.0), ("v_proj", 2, 3.0)]
    modules = tuple(lora.Module(f"layers.0.self_attn.{name}.weight", *size) for name, *size in modules)
    given = lora.Lora(lm, modules, rslora=True)
    assert [given.scale(module) for module in modules] == [4 / 2**0.5, 2, 3 / 2**0.5]
    adapter = drawn(given)
    lora.save(tmp_path, given, adapter)
    again, found = lora.load(tmp_path, lm)
    assert again == given
    jax.tree.map(np.testing.assert_array_equal, found, adapter)


MIXTRAL = Decoder(
    Config(
        "mixtral",
        **{"vocab_size": 5, "hidden_size": 4, "intermediate_size": 4, "num_local_experts": 2, "head_dim": 4},
        **{"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1},
    )
)


def test_targets_are_ends_of_names_or_one_pattern():
    def chosen(targets):
        return [name.removesuffix(".weight") for name in lora.lora(MIXTRAL, targets=targets).names]

    both = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    assert chosen(["q_proj"]) == chosen(["self_attn.q_proj"]) == chosen(r"model\.layers\.\d\.self_attn\.q_proj") == both
    assert chosen(["model.layers.1.self_attn.q_proj"]) == chosen(["1.self_attn.q_proj"]) == both[1:]
    everything = [f"layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "koqv"]
    assert sorted(chosen("all-linear")) == everything, "neither head nor experts nor router"


def test_a_layer_is_saved_by_its_whole_name_where_others_end_alike(gpt2, tmp_path):
    lm, _ = gpt2
    given = lora.lora(lm, rank=2, targets=["attn.c_proj"])
    lora.save(tmp_path, given, given.init(KEY))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["transformer.h.0.attn.c_proj"]
    assert lora.load(tmp_path, lm)[0] == given


def test_half_precision_is_widened(gpt2, tmp_path):
    lm, _ = gpt2
    given = lora.lora(lm, rank=2)
    adapter = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), drawn(given))
    lora.save(tmp_path, given, adapter)
    _, found = lora.load(tmp_path, lm)
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(new, old.astype("float32"), strict=True), found, adapter
    )


def test_targets_may_be_mixed(gpt2):
    lm, _ = gpt2
    given = lora.lora(lm, targets=["c_fc", r".*\.attn\.c_pr.*"])
    assert given.names == ("h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight")
    assert lora.lora(lm, targets="c_fc") == lora.lora(lm, targets=["c_fc"])
    assert lora.lora(lm, targets=["all-linear"]) == lora.lora(lm, targets="all-linear")


# Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_is_that_of_peft():
    """Inputs of the adapter alone, for each token by itself, at the scale that keeps the mean; none without a key."""
    layer = Linear(6, 5, std=1.0, use_bias=True, rngs=nnx.Rngs(0))
    kernel, x = layer.kernel[...], jax.random.normal(jax.random.key(1), (7, 3, 6))
    a, b = (jax.random.normal(jax.random.key(seed), shape) for seed, shape in ((2, (6, 2)), (3, (2, 5))))
    plain = np.asarray(layer(x))
    layer.kernel = nnx.Param(Adapted(kernel, a, b, KEY, 0.25))
    kept = np.asarray(jax.random.bernoulli(KEY, 0.75, (21, 6))).reshape(7, 3, 6)
    assert 0.6 < kept.mean() < 0.9 and len({row.tobytes() for row in kept.reshape(21, 6)}) > 10
    close(layer(x), plain + kept * x / 0.75 @ a @ b, rtol=1e-5)


def test_dropout_follows_its_key_and_is_off_without_one():
    lm, params = TINY["llama"], random_params(TINY["llama"])
    given = lora.lora(lm, rank=2, dropout=0.5)
    adapter, tokens = drawn(given), np.arange(12).reshape(2, 6)
    logits = jax.jit(lambda given, key: lm.apply(given.merge(params, adapter, key), tokens)[0], static_argnums=0)
    merged = logits(given, None)
    without, merge = dataclasses.replace(given, dropout=0.0), jax.jit(lora.Lora.merge, static_argnums=0)
    for same in (merge(without, params, adapter, KEY), merge(given, params, adapter)):
        jax.tree.map(np.testing.assert_array_equal, same, merge(without, params, adapter))
    first, again, other = (logits(given, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1 and np.abs(first - merged).max() > 0.1
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), but is 1"):
        lora.lora(lm, dropout=1)


@pytest.mark.slow
def test_every_step_and_every_part_of_a_batch_draws_its_own_dropout(gpt2):
    lm, params = gpt2
    given = lora.lora(lm, rank=2, dropout=0.5)
    frozen, view, still = steps.Frozen(base=params), given.view(), optax.sgd(0.0)
    half = jax.tree.map(lambda leaf: leaf[:2], answers(lm))
    batch = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 4, axis=0), half)  # four rows that are one
    losses = {}
    for parts in (1, 2):
        step = steps.make_step(sft_loss(lm), still, view=view, microbatches=parts)
        state = steps.initial_state(drawn(given), still, KEY)
        for _ in range(2):
            state, metrics = step(state, batch, frozen)
            losses[parts, int(state.step)] = float(metrics["loss"])
    assert len({round(loss, 4) for loss in losses.values()}) == 4


# Folders as models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny Llama with the tokenizer of tiny-gpt2, and its parameters."""
    folder, lm, params = tmp_path_factory.mktemp("base"), TINY["llama"], random_params(TINY["llama"])
    models.save(folder, lm, params, models.load("tiny-gpt2").tokenizer, config={"eos_token_id": 3})
    return folder, params


def test_the_folder_of_an_adapter_is_a_model(base, tmp_path):
    folder, params = base
    given = lora.lora(TINY["llama"], rank=2)
    adapter = drawn(given)
    lora.save(tmp_path / "adapter", given, adapter, base=str(folder))
    loaded, whole = models.load(tmp_path / "adapter"), models.load(folder)
    merge = jax.jit(given.merge)
    jax.tree.map(close, loaded.params, merge(params, adapter))
    assert loaded.model == whole.model and loaded.config == whole.config
    assert loaded.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert models.load(tmp_path / "adapter", dtype="bfloat16").params["norm"]["scale"].dtype == "bfloat16"
    lora.save(tmp_path / "second", given, adapter, base=str(tmp_path / "adapter"))
    twice = merge(merge(params, adapter), adapter)
    jax.tree.map(close, models.load(tmp_path / "second").params, twice)


def test_the_adapter_of_a_reward_model_is_one(base, tmp_path):
    folder, params = base
    given, head = lora.lora(TINY["llama"], rank=2), np.arange(16, dtype="f")
    adapter = drawn(given)
    lora.save(tmp_path / "adapter", given, adapter, base=str(folder), head=head)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    found = models.load_reward_model(tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, found.params["model"], given.merge(params, adapter))
    np.testing.assert_array_equal(found.params["head"], head)
    assert lora.load(tmp_path / "adapter", TINY["llama"])[0] == given
    with pytest.raises(ValueError, match=r"is a reward model: load it with jl\.train\.RewardModel\.load"):
        jl.load(tmp_path / "adapter")
    lora.save(tmp_path / "plain", given, adapter, base=str(folder))
    with pytest.raises(ValueError, match=r"is not a reward model: score.weight must be .* but is missing"):
        models.load_reward_model(tmp_path / "plain")


@pytest.mark.parametrize(
    ("recorded", "error", "said"),
    [
        ("", ValueError, "must name the base model of its adapter, base_model_name_or_path .*, but has ''"),
        (None, ValueError, "but has None: load the base model, and the adapter onto it by"),
        ("/no/where", FileNotFoundError, "is an adapter of /no/where, which cannot be loaded: there is no folder"),
        ("itself", ValueError, "must name another folder as the base model of its adapter, but names itself"),
        ("tiny-gpt2-verses", ValueError, "must hold lora_A and lora_B of linear layers such as transformer"),
    ],
)
def test_an_adapter_whose_base_is_not_there_is_refused(tmp_path, recorded, error, said):
    given = lora.lora(TINY["llama"], rank=2)
    lora.save(tmp_path, given, given.init(KEY))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path) if recorded == "itself" else recorded
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said):
        models.load(tmp_path)


def test_what_does_not_fit_is_named(gpt2):
    lm, _ = gpt2
    with pytest.raises(ValueError, match="rank must be at least 1, but is 0"):
        lora.lora(lm, rank=0)
    for targets, named in ((["q_proj"], "q_proj"), ([], "none"), ("attn", "attn"), (["attn", "c_fc"], "attn")):
        with pytest.raises(ValueError, match=rf"among c_attn, c_fc, c_proj, or match .*\.c_attn, but are {named}\."):
            lora.lora(lm, targets=targets)
    with pytest.raises(ValueError, match=r"targets must be a regular expression, but is '\(c'"):
        lora.lora(lm, targets="(c")
    given = lora.lora(lm, rank=2)
    with pytest.raises(ValueError, match=r"missing h\.0\.attn\.c_attn\.weight"):
        given.merge(random_params(lm), {})
    with pytest.raises(ValueError, match="the adapter is of another model or rank"):
        given.merge(random_params(lm), lora.lora(lm, rank=3).init(KEY))


REFUSED = {  # changes of adapter_config.json, or its text, and what the message names
    "no plain LoRA": ({"peft_type": "LOHA"}, "is not that of a plain LoRA adapter: peft_type is 'LOHA'"),
    "changed weights": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, "target_parameters is"),
    "a later field": ({"use_zlora": True, "zlora_config": None}, "adapter: use_zlora is True[.]"),
    "no rank": ({"r": None}, "json: r must be a positive integer, but is None"),
    "no alpha": ({"lora_alpha": "16"}, "lora_alpha must be a finite number, 0 or above, but is '16'"),
    "rslora": ({"use_rslora": "no"}, "use_rslora must be true or false, but is 'no'"),
    "ranks": ({"rank_pattern": [2]}, r"rank_pattern must be an object, but is \[2\]"),
    "a rank": ({"rank_pattern": {"c_attn": 3}}, r"another model or rank: h.0.attn.c_attn.weight is .*\(2, 48\).*, not"),
    "a pattern": ({"alpha_pattern": {"(c": 3}}, r"alpha_pattern must be a regular expression, but is '\(c'"),
    "too much": ({"rank_pattern": {"a{99999999999}": 3}}, "rank_pattern must be a regular expression"),
    "no JSON": ("{", "adapter_config.json is not JSON"),
    "no object": ("[]", "must hold a JSON object, but holds a list"),
    "no text": (b"\xff", "adapter_config.json is not JSON"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of an adapter of GPT-2."""
    folder, given = tmp_path_factory.mktemp("adapter"), lora.lora(TINY["gpt2"], rank=2)
    lora.save(folder, given, given.init(KEY))
    return folder


@pytest.mark.parametrize(("change", "named"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_that_changes_the_function_or_is_damaged_is_refused(change, named, saved, tmp_path):
    config = json.loads((saved / "adapter_config.json").read_text())
    text = json.dumps(config | change) if isinstance(change, dict) else change
    (tmp_path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    shutil.copy(saved / "adapter_model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=named):
        lora.load(tmp_path, TINY["gpt2"])


C_ATTN = "base_model.model.transformer.h.0.attn.c_attn.lora_"
A, B = {f"{C_ATTN}A.weight": np.zeros((2, 16), "f")}, {f"{C_ATTN}B.weight": np.zeros((48, 2), "f")}
HELD = {  # tensors, and what the message names
    "nothing": ({}, "but holds nothing"),
    "another module": (
        {f"{C_ATTN}A.weight".replace("c_attn", "q"): A[f"{C_ATTN}A.weight"]},
        "but holds .*attn.q.lora_A",
    ),
    "a magnitude": ({f"{C_ATTN}magnitude_vector": np.zeros(48, "f")}, "but holds .*magnitude_vector of float32"),
    "integers": ({f"{C_ATTN}A.weight": np.zeros((2, 16), int)}, "A.weight of int64"),
    "no B": (A, r"c_attn.weight is {'a': \(16, 2\)}, not {'a': \(16, 2\), 'b': \(2, 48\)}"),
    "a vector": (B | {f"{C_ATTN}A.weight": np.zeros(32, "f")}, r"c_attn.weight is {'a': \(32,\)"),
    "twice": (A | B | {name.replace("transformer.", ""): leaf for name, leaf in A.items()}, "lora_A.weight twice"),
    "an expert": (
        {"base_model.model.model.layers.0.mlp.experts.0.w1.lora_A.weight": np.zeros((2, 4), "f")},
        r"or experts\), but holds .*experts\.0\.w1\.lora_A",
    ),
}


@pytest.mark.parametrize(("tensors", "named"), HELD.values(), ids=HELD)
def test_tensors_that_are_no_adapters_of_the_model_are_named(tensors, named, saved, tmp_path):
    shutil.copy(saved / "adapter_config.json", tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=named):
        lora.load(tmp_path, MIXTRAL if "expert" in named else TINY["gpt2"])


def test_absent_and_damaged_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no adapter_config"):
        lora.load(tmp_path, TINY["gpt2"])
    shutil.copy(saved / "adapter_config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must have adapter_model\.safetensors, but has adapter_config"):
        lora.load(tmp_path, TINY["gpt2"])
    (tmp_path / "adapter_model.safetensors").write_bytes((saved / "adapter_model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or incomplete"):
        lora.load(tmp_path, TINY["gpt2"])
    with pytest.raises(ValueError, match=r"must hold .* of linear layers such as model\.layers.*c_attn\.lora_A"):
        lora.load(saved, TINY["llama"])

"""transformers and PEFT read what is saved here: reward models, and adapters."""

import copy
import warnings

import jax
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.models import ScalarHead, families, lora
from tests.conftest import TINY, random_params

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(1, 23, (3, 9))


@pytest.mark.parametrize("name", ["gpt2", "llama", "stablelm"])
def test_transformers_gives_a_reward_models_scores(name, tmp_path):
    """Also where rows end before their last place: padding is a token of its own."""
    import torch
    import transformers

    lm = TINY[name]
    head = ScalarHead(lm)
    params = head.init(jax.random.key(0), random_params(lm))
    models.save_reward_model(tmp_path, head, params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    theirs.config.pad_token_id = 0
    tokens = TOKENS.copy()
    tokens[1, 6:] = 0
    mask = tokens > 0
    with torch.no_grad():
        found = theirs(torch.as_tensor(tokens), attention_mask=torch.as_tensor(mask)).logits[:, 0]
    np.testing.assert_allclose(head.scores(params, tokens, mask), found.numpy(), atol=1e-4)


SIZES = {
    **{"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0},
}
OTHERS = {  # what a small model of the family needs beside SIZES
    **{name: {"head_dim": 8} for name in ("qwen3", "gemma", "gemma2", "gemma3_text")},
    **{name: {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2} for name in ("t5", "mt5", "umt5")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **{"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        "mlp_only_layers": [1],
    },
}


class Pair:
    """A tiny random model of a family, in transformers and here."""

    def __init__(self, family, folder):
        import torch
        import transformers

        config = transformers.AutoConfig.for_model(family, **SIZES | OTHERS.get(family, {}))
        kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        torch.manual_seed(0)
        self.base = getattr(transformers, kind).from_config(config).eval()
        with torch.no_grad():
            for parameter in self.base.parameters():
                # T5 does not scale its scores: much noise would make one attention as good as discrete.
                parameter.add_(torch.randn_like(parameter) * (0.05 if config.is_encoder_decoder else 0.25))
        self.base.save_pretrained(folder)
        self.loaded = models.load(folder)
        self.given = {"decoder_input_ids": torch.as_tensor(TOKENS)} if config.is_encoder_decoder else {}
        self.ours = jax.jit(self._ours)

    def _ours(self, params):
        model = self.loaded.model
        if self.given:
            model, params = model.start(params, TOKENS)
        return model.apply(params, TOKENS)[0]

    def theirs(self, model):
        """The logits in torch."""
        import torch

        with torch.no_grad():
            return model(input_ids=torch.as_tensor(TOKENS), **self.given).logits.numpy()


@pytest.mark.parametrize("family", families.FAMILIES)
def test_adapters_are_those_of_peft(family, tmp_path):
    """PEFT's of every linear layer, with ranks and scales of their own, load here; and those of here load there."""
    import peft

    pair = Pair(family, tmp_path / "model")
    model, params = pair.loaded.model, pair.loaded.params
    config = peft.LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=r".*\.self_attn\..*_proj" if "num_experts_per_tok" in OTHERS.get(family, ()) else "all-linear",
        use_rslora=True,
        rank_pattern={r".*\.0\..*": 2},
        alpha_pattern={r".*\.1\..*": 3},
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(pair.base, config).eval()
    tuned.save_pretrained(tmp_path / "peft")
    given, adapter = lora.load(tmp_path / "peft", model)
    assert given.names == lora.lora(model, targets=config.target_modules).names
    merged, before = pair.ours(given.merge(params, adapter)), pair.ours(params)
    np.testing.assert_allclose(merged, pair.theirs(tuned), atol=1e-4)
    assert np.abs(merged - before).max() > 0.01, "the adapter changes something"
    base = tuned.unload()
    np.testing.assert_allclose(before, pair.theirs(base), atol=1e-4)

    given = lora.lora(model, rank=3, alpha=2, targets="all-linear")
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, given.init(jax.random.key(1)))
    lora.save(tmp_path / "adapter", given, adapter, base=str(tmp_path / "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # tensors that PEFT does not find
        tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = pair.ours(given.merge(params, adapter))
    np.testing.assert_allclose(merged, pair.theirs(tuned), atol=1e-4)
    assert np.abs(merged - before).max() > 0.01


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama with a head of its own."""
    return Pair("llama", tmp_path_factory.mktemp("llama"))


ACCEPTED = {
    "a pattern": {"target_modules": r".*self_attn\.(q|k)_proj"},
    "ends": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 0},
    "not all": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "down_proj"]},
    "ranks": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 4}, "alpha_pattern": {"v_proj": 9, "q_proj": 5}},
    "rslora": {"use_rslora": True, "alpha_pattern": {r"layers\.1.*": 5}},
    "ignored": {"fan_in_fan_out": True, "lora_dropout": 0.3, "ensure_weight_tying": True},
    **{str(start): {"init_lora_weights": start} for start in (True, False, "gaussian", "orthogonal", "eva", "mica")},
}
REFUSED = {
    **{start: ({"init_lora_weights": start}, "init_lora_weights") for start in ("pissa", "pissa_niter_2", "olora")},
    "dora": ({"use_dora": True}, "use_dora"),
    "alora": ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "layers": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.base_layer.weight"),
}


def tuned(pair, folder, **options):
    """PEFT's model with random adapters of these options, read again from its folder."""
    import peft
    import torch

    options = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]} | options
    model = peft.get_peft_model(copy.deepcopy(pair.base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(pair.base), folder).eval()


@pytest.mark.parametrize("options", ACCEPTED.values(), ids=ACCEPTED)
def test_what_peft_says_of_layers_ranks_and_scales_is_understood(options, llama, tmp_path):
    """And what is saved again says the same."""
    model, params = llama.loaded.model, llama.loaded.params
    expected = llama.theirs(tuned(llama, tmp_path / "theirs", **options))
    given, adapter = lora.load(tmp_path / "theirs", model)
    np.testing.assert_allclose(llama.ours(given.merge(params, adapter)), expected, atol=1e-4)
    assert np.abs(expected - llama.ours(params)).max() > 0.01
    lora.save(tmp_path / "ours", given, adapter)
    import peft

    again = peft.PeftModel.from_pretrained(copy.deepcopy(llama.base), tmp_path / "ours").eval()
    np.testing.assert_allclose(llama.theirs(again), expected, atol=1e-5)


@pytest.mark.parametrize(("options", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_is_refused(options, named, llama, tmp_path):
    tuned(llama, tmp_path, **options)
    with pytest.raises(ValueError, match=named):
        lora.load(tmp_path, llama.loaded.model)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma3_text"])
def test_adapters_of_reward_models_are_those_of_peft(family, tmp_path):
    """PEFT's of a sequence classifier load here with the head, by the base that they record; and ours load there."""
    import peft
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(family, **SIZES | OTHERS.get(family, {}), num_labels=1)
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    base.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=3, lora_alpha=2, task_type="SEQ_CLS", init_lora_weights=False, lora_dropout=0.2)
    tuned = peft.get_peft_model(copy.deepcopy(base), options).eval()
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with torch.no_grad():
        tuned.base_model.model.score.modules_to_save["default"].weight.add_(0.5)
    tuned.save_pretrained(tmp_path / "theirs")

    def theirs(model):
        with torch.no_grad():
            return model(input_ids=torch.as_tensor(TOKENS)).logits[:, 0].numpy()

    expected, found = theirs(tuned), models.load_reward_model(tmp_path / "theirs")
    np.testing.assert_allclose(found.head.scores(found.params, TOKENS), expected, atol=1e-4)
    assert np.abs(theirs(base) - expected).max() > 0.01

    given = lora.lora(found.head.lm, rank=2, alpha=5, targets="all-linear", rslora=True)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, given.init(jax.random.key(1)))
    head = jax.random.normal(jax.random.key(2), (16,))
    lora.save(tmp_path / "ours", given, adapter, base=str(tmp_path / "base"), head=head)
    ours = models.load_reward_model(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    scores = ours.head.scores(ours.params, TOKENS)
    np.testing.assert_allclose(scores, theirs(again), atol=1e-4)
    assert np.abs(scores - expected).max() > 0.01

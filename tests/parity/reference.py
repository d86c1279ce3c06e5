"""Random small models of transformers + torch, and what they compute: the reference of goldens and parity tests."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
import transformers

EOS, PAD = 1, 0
NEW_TOKENS = 12


def random_model(config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """A model with every parameter random, biases and norms too, and logits far from uniform."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                centre = 0.0 if name.endswith("bias") or config.model_type.startswith("gemma") else 1.0
                parameter.copy_(torch.randn_like(parameter) * 0.2 + centre)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    return model


def random_prompts(rng: np.random.Generator, vocab_size: int, *, rows: int = 3, length: int = 9):
    """Tokens and mask of a ragged batch, padded on the left."""
    tokens = rng.integers(2, vocab_size, (rows, length))
    lengths = rng.integers(1, length + 1, rows)
    lengths[0] = length
    mask = np.arange(length) >= length - lengths[:, None]
    return np.where(mask, tokens, PAD), mask


def compute(model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Logits at every place and greedy continuations, of a left-padded batch."""
    ids, attention = torch.tensor(tokens), torch.tensor(mask).long()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=attention, position_ids=positions).logits
        generated = model.generate(
            ids,
            attention_mask=attention,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=0,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, ids.shape[1] :]
    padded = np.full((len(tokens), NEW_TOKENS), PAD)
    padded[:, : generated.shape[1]] = generated.numpy()
    return {"tokens": tokens, "mask": mask, "logits": logits.float().numpy(), "generated": padded}


def random_config(rng: np.random.Generator, family: str) -> transformers.PretrainedConfig:
    """A random small configuration of the family, special tokens included."""
    heads, kv_heads = [(1, 1), (2, 1), (4, 2), (4, 4), (6, 2)][rng.integers(5)]
    head_dim = int(rng.choice([4, 8, 16]))
    special = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    vocab = int(rng.integers(20, 120))
    layers = int(rng.integers(1, 4))
    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab,
            n_positions=48,
            n_embd=heads * head_dim,
            n_layer=layers,
            n_head=heads,
            n_inner=[None, 40][rng.integers(2)],
            activation_function=["gelu_new", "gelu", "relu"][rng.integers(3)],
            layer_norm_epsilon=float(rng.choice([1e-5, 1e-3])),
            scale_attn_by_inverse_layer_idx=bool(rng.integers(2)),
            tie_word_embeddings=bool(rng.integers(2)),
            **special,
        )
    rope = copy.deepcopy(SCALINGS[rng.integers(3)])  # transformers adds to what it is given
    if family == "stablelm":
        return stablelm_config(rng, heads, kv_heads, layers, vocab, rope, special)
    if family == "llama":
        bias = bool(rng.integers(2))
        return transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=heads * head_dim,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=int(rng.choice([head_dim, 2 * head_dim])),
            max_position_embeddings=48,
            rms_norm_eps=float(rng.choice([1e-6, 1e-3])),
            rope_parameters=rope,
            attention_bias=bias,
            mlp_bias=bias,
            tie_word_embeddings=bool(rng.integers(2)),
            **special,
        )
    layers = int(rng.integers(2, 6))
    head_dim = int(rng.choice([8, 16]))
    sizes = {"vocab_size": vocab, "hidden_size": heads * head_dim, "num_hidden_layers": layers} | special
    sizes |= {"num_attention_heads": heads, "max_position_embeddings": 48}
    if family not in ("bloom", "falcon", "gpt_neo", "gptj", "opt"):
        sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": 24}
    options = {name: copy.deepcopy(values[rng.integers(len(values))]) for name, values in OPTIONS[family].items()}
    if family in ("qwen3", "gemma", "gemma2", "gemma3_text", "qwen3_moe"):
        options["head_dim"] = int(rng.choice([head_dim, 2 * head_dim]))
    if family == "gptj":
        options["rotary_dim"] = int(rng.choice([2, head_dim]))
    if family in ("phi", "gpt_neox"):
        sizes["num_key_value_heads"] = heads
    if family == "gpt_neo":
        del sizes["num_hidden_layers"], sizes["num_attention_heads"]
        options |= {"attention_types": [[["global", "local"], layers]], "num_layers": 2 * layers, "num_heads": heads}
    if family == "falcon" and options["new_decoder_architecture"]:
        options["num_kv_heads"] = kv_heads
    if options.pop("longrope", False):
        half = head_dim // 2
        options["rope_parameters"] = {
            **{"rope_type": "longrope", "rope_theta": 1000.0, "original_max_position_embeddings": 32, "factor": 1.5},
            **{"short_factor": [1 + 0.1 * i for i in range(half)], "long_factor": [2.0 + i for i in range(half)]},
        }
        options["original_max_position_embeddings"] = 32
    return transformers.AutoConfig.for_model(family, **sizes | options)


SCALINGS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    {
        **{"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    },
    {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
]
BOTH = [False, True]
WINDOWS = {"sliding_window": [2, 5]}
CAPS = {"query_pre_attn_scalar": [4, 30], "attn_logit_softcapping": [None, 5.0], "final_logit_softcapping": [None, 7.0]}
ROPE = {"rope_parameters": SCALINGS}
MOE = {"num_experts": [3, 5], "num_experts_per_tok": [1, 2], "norm_topk_prob": BOTH}
OPTIONS = {  # of each family: one of the values of each field
    "mistral": ROPE | {"sliding_window": [None, 2, 5]},
    "qwen2": ROPE | WINDOWS | {"use_sliding_window": BOTH, "max_window_layers": [0, 1], "tie_word_embeddings": BOTH},
    "qwen3": ROPE | WINDOWS | {"use_sliding_window": BOTH, "max_window_layers": [0, 1], "attention_bias": BOTH},
    "gemma": {"attention_bias": BOTH, "rms_norm_eps": [1e-6, 1e-3]},
    "gemma2": CAPS | WINDOWS,
    "gemma3_text": CAPS | WINDOWS | {"sliding_window_pattern": [2, 3], "attn_logit_softcapping": [None]},
    "olmo": ROPE | {"clip_qkv": [None, 1.0], "tie_word_embeddings": BOTH},
    "olmo2": ROPE | {"attention_bias": BOTH},
    "olmo3": WINDOWS | ROPE,
    "smollm3": ROPE | {"no_rope_layer_interval": [2, 3], "mlp_bias": BOTH, "tie_word_embeddings": BOTH},
    "phi": {"rope_parameters": [SCALINGS[0] | {"partial_rotary_factor": part} for part in (0.25, 0.5, 1.0)]},
    "phi3": {"sliding_window": [None, 3], "tie_word_embeddings": BOTH, "longrope": BOTH},
    "gpt_neox": {"rotary_pct": [0.25, 1.0], "use_parallel_residual": BOTH, "attention_bias": BOTH},
    "gpt_neo": {"window_size": [2, 4]},
    "gptj": {"n_inner": [None, 40], "tie_word_embeddings": [False]},
    "opt": {"ffn_dim": [24, 40], "activation_function": ["relu", "gelu"], "enable_bias": BOTH},
    "falcon": {
        **{"multi_query": BOTH, "parallel_attn": BOTH, "bias": BOTH, "alibi": BOTH},
        "new_decoder_architecture": [False, False, True],
    },
    "bloom": {"layer_norm_epsilon": [1e-5, 1e-3]},
    "cohere": ROPE | {"logit_scale": [0.5, 2.0], "use_qk_norm": BOTH},
    "cohere2": WINDOWS | {"logit_scale": [0.5, 2.0]},
    "granite": {
        **{"embedding_multiplier": [1.0, 3.0], "residual_multiplier": [0.5], "attention_multiplier": [0.2, 1.0]},
        **{"logits_scaling": [0.5, 2.0], "attention_bias": BOTH, "mlp_bias": BOTH},
    },
    "mixtral": {"num_local_experts": [3, 5], "num_experts_per_tok": [1, 2], "sliding_window": [None, 3]},
    "olmoe": MOE | {"clip_qkv": [None, 1.0]},
    "qwen3_moe": MOE | {"moe_intermediate_size": [8, 12], "mlp_only_layers": [[], [1]], "decoder_sparse_step": [1, 2]},
}
FAMILIES = ("gpt2", "llama", "stablelm", *OPTIONS)


def stablelm_config(rng, heads, kv_heads, layers, vocab, rope, special) -> transformers.StableLmConfig:
    """A random StableLM, of heads that have coordinates enough to turn a quarter of."""
    head_dim = int(rng.choice([8, 16]))
    return transformers.StableLmConfig(
        vocab_size=vocab,
        hidden_size=heads * head_dim,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=48,
        layer_norm_eps=float(rng.choice([1e-5, 1e-3])),
        rope_parameters=rope | {"partial_rotary_factor": float(rng.choice([0.25, 0.3, 0.5, 0.75, 1.0]))},
        use_qkv_bias=bool(rng.integers(2)),
        qk_layernorm=bool(rng.integers(2)),
        use_parallel_residual=bool(rng.integers(2)),
        tie_word_embeddings=bool(rng.integers(2)),
        **special,
    )


def save(model: transformers.PreTrainedModel, folder: Path) -> None:
    """The model as transformers writes it."""
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)

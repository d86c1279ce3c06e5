"""Random small models of transformers + torch, and what they compute: the reference of goldens and parity tests."""

from __future__ import annotations

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
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.0 if name.endswith("bias") else 1.0))
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
    rope = [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ][rng.integers(3)]
    if family == "stablelm":
        return stablelm_config(rng, heads, kv_heads, layers, vocab, rope, special)
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

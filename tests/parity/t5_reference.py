"""Random small T5s and their kin of transformers + torch, and what they compute, for goldens and parity tests."""

from __future__ import annotations

import numpy as np
import torch
import transformers

EOS, PAD = (1, 3, 8), 0
NEW_TOKENS, BEAMS = 12, 4
PENALTIES = (0.0, 1.0, -0.5)
# Of matrices 0.5; of queries and keys less, for attention is not scaled and would be too sharp for float32.
STDS = {"norm": 0.2, "relative": 1.0, "shared": 0.3, "lm_head": 0.3, ".q.": 0.25, ".k.": 0.25}


FAMILIES = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration),
    "mt5": (transformers.MT5Config, transformers.MT5ForConditionalGeneration),
    "umt5": (transformers.UMT5Config, transformers.UMT5ForConditionalGeneration),
}


def random_config(rng: np.random.Generator, family: str = "t5", **fields) -> transformers.PretrainedConfig:
    """A random small configuration; more layers in the encoder, in the decoder, or as many."""
    buckets = int(rng.choice([4, 8, 11]))
    sizes = {
        "vocab_size": int(rng.integers(20, 60)),
        "d_model": int(rng.choice([8, 16, 24])),
        "d_kv": int(rng.choice([4, 5, 8])),
        "d_ff": int(rng.choice([16, 32])),
        "num_layers": int(rng.integers(1, 4)),
        "num_decoder_layers": int(rng.integers(1, 4)),
        "num_heads": int(rng.integers(1, 4)),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": buckets // 2 + int(rng.integers(1, 9)),
        "layer_norm_epsilon": float(rng.choice([1e-6, 1e-3])),
        "feed_forward_proj": ["relu", "gated-gelu", "gated-silu", "gelu"][rng.integers(4)],
        "tie_word_embeddings": bool(rng.integers(2)),
        "decoder_start_token_id": int(rng.integers(3)),
    }
    return FAMILIES[family][0](**sizes | fields, attn_implementation="eager")  # the one that returns its weights


def random_model(
    config: transformers.PretrainedConfig, seed: int, *, tied: bool | None = None
) -> transformers.PreTrainedModel:
    """A model with every parameter random, norms too, and logits far from uniform.

    Whether it is tied stands in `scale_decoder_outputs` by default: transformers 5 ties every T5 that it makes anew.
    """
    torch.manual_seed(seed)
    model = FAMILIES[config.model_type][1](config).eval()
    if not (config.scale_decoder_outputs if tied is None else tied):
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(config.vocab_size, config.d_model))
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = next((std for part, std in STDS.items() if part in name), 0.5)
            parameter.copy_(torch.randn_like(parameter) * std + ("norm" in name))
    return model


def random_sources(rng: np.random.Generator, vocab_size: int, *, length: int = 9):
    """Tokens and mask of four sources: whole, padded on the right, on the left, of one token."""
    tokens = rng.integers(2, vocab_size, (4, length))
    time = np.arange(length)
    short = rng.integers(2, length, 2)
    mask = np.stack([time >= 0, time < short[0], time >= length - short[1], time == 0])
    return np.where(mask, tokens, PAD), mask


def compute(
    model: transformers.PreTrainedModel, source: np.ndarray, mask: np.ndarray, target: np.ndarray
) -> dict[str, np.ndarray]:
    """Logits and attention weights of the targets [layer, batch, head, query, key], and what is generated.

    `beams` and `scores` are [penalty, batch, beam, ...]. The generated tokens are without the start token.
    """
    inputs = {"input_ids": torch.tensor(source), "attention_mask": torch.tensor(mask).long()}
    with torch.no_grad():
        out = model(**inputs, decoder_input_ids=torch.tensor(target), output_attentions=True)
        greedy = _generate(model, inputs, num_beams=1).sequences
        beams = [
            _generate(model, inputs, num_beams=BEAMS, num_return_sequences=BEAMS, length_penalty=penalty)
            for penalty in PENALTIES
        ]
    maps = {
        name: np.stack([each.numpy() for each in out[f"{key}attentions"]])
        for name, key in (("encoder", "encoder_"), ("decoder", "decoder_"), ("cross", "cross_"))
    }
    shape = (len(source), BEAMS)
    return {
        "source": source,
        "mask": mask,
        "target": target,
        "logits": out.logits.numpy(),
        **maps,
        "generated": _padded(greedy),
        "beams": np.stack([_padded(each.sequences).reshape(*shape, NEW_TOKENS) for each in beams]),
        "scores": np.stack([each.sequences_scores.numpy().reshape(shape) for each in beams]),
    }


def _generate(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor], **options):
    """Without transformers' cache, which counts the encoder's layers where there are more in the decoder."""
    return model.generate(
        **inputs,
        **options,
        **({"early_stopping": "never", "output_scores": True} if options["num_beams"] > 1 else {}),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=False,
        eos_token_id=list(EOS),
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )


def _padded(sequences: torch.Tensor) -> np.ndarray:
    """The new tokens, PAD after the first that ends."""
    new = sequences[:, 1:].numpy()
    new = np.pad(new, ((0, 0), (0, NEW_TOKENS - new.shape[1])), constant_values=PAD)
    ends = np.isin(new, EOS)
    return np.where(np.cumsum(ends, axis=1) - ends > 0, PAD, new)

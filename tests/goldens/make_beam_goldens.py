"""Make the beam goldens: what transformers + torch finds by beam search with models of the other goldens.

    PYTHONPATH=.parity python tests/goldens/make_beam_goldens.py

One file a model in `beam/`: settings [S, 2] (length penalty, n of the n-gram block), tokens [S, B, K, N] (0 after the
end) and scores [S, B, K] of the K = 4 best continuations of the model's golden prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
SETTINGS = ((0.0, 0), (1.0, 0), (2.0, 0), (-1.0, 0), (0.0, 2), (1.0, 2))
BEAMS, NEW_TOKENS = 4, 12
EOS, PAD = (1, 3, 8, 13), 0


def beams(
    model: transformers.PreTrainedModel, tokens: np.ndarray, mask: np.ndarray, *, penalty: float, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best continuations [B, K, N] of a padded batch, and their scores [B, K], by transformers.

    Row by row without padding, which transformers would count among its n-grams.
    """
    found = [_beams_of(model, row[valid], penalty, n) for row, valid in zip(tokens, mask, strict=True)]
    return tuple(np.stack(each) for each in zip(*found, strict=True))


def _beams_of(
    model: transformers.PreTrainedModel, prompt: np.ndarray, penalty: float, n: int
) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        found = model.generate(
            torch.tensor(prompt)[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            length_penalty=penalty,
            early_stopping="never",
            no_repeat_ngram_size=n,
            eos_token_id=list(EOS),
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
    new = found.sequences[:, len(prompt) :].numpy()
    padded = np.pad(new, ((0, 0), (0, NEW_TOKENS - new.shape[1])), constant_values=PAD)
    ends = np.isin(padded, EOS)
    ended = np.cumsum(ends, axis=1) - ends > 0  # where pad is 0, transformers fills up with EOS
    return np.where(ended, PAD, padded), found.sequences_scores.numpy()


def main() -> None:
    """Write one file for each of the models."""
    (HERE / "beam").mkdir(exist_ok=True)
    for name in ("gpt2-1", "llama-1"):
        model = transformers.AutoModelForCausalLM.from_pretrained(HERE / name).eval()
        inputs = load_file(HERE / name / "expected.safetensors")
        prompts = inputs["tokens"], inputs["mask"]
        found = [beams(model, *prompts, penalty=penalty, n=n) for penalty, n in SETTINGS]
        tokens, scores = (np.stack(each) for each in zip(*found, strict=True))
        arrays = {"settings": np.asarray(SETTINGS, np.float32), "tokens": tokens.astype(np.int32), "scores": scores}
        save_file(arrays, HERE / "beam" / f"{name}.safetensors")
        print(name, (tokens != 0).sum(axis=-1).tolist())


if __name__ == "__main__":
    main()

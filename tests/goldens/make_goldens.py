"""Make the goldens: small random models as transformers writes them, and what transformers + torch computes with them.

    make goldens
    python tests/goldens/make_goldens.py qwen2 qwen3  # these families alone; needs torch

Each folder holds `config.json`, `model.safetensors` and `expected.safetensors` (tokens, mask, logits, generated).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))

import reference

HERE = Path(__file__).parent
SEEDS = {
    **{"gpt2": (0, 1), "llama": (0, 1), "stablelm": (318, 111)},  # StableLM's: every option off, and every one on
    # With a window (but for Olmo 2), two layers or more, and rows that do not repeat one token:
    **{"mistral": (4,), "qwen2": (42,), "qwen3": (42,), "gemma2": (159,), "gemma3_text": (10,)},
    **{"olmo2": (9,), "smollm3": (35,), "phi3": (2,)},
}


def main() -> None:
    """Write the goldens."""
    for family in sys.argv[1:] or SEEDS:
        for number, seed in enumerate(SEEDS[family]):
            folder = HERE / f"{family}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            rng = np.random.default_rng([seed, len(family)])
            config = reference.random_config(rng, family)
            model = reference.random_model(config, seed)
            reference.save(model, folder)
            expected = reference.compute(model, *reference.random_prompts(rng, config.vocab_size))
            save_file(
                {name: np.ascontiguousarray(value) for name, value in expected.items()}, folder / "expected.safetensors"
            )
            print(f"{folder.name}: {model.num_parameters()} parameters, generated {expected['generated'].tolist()}")


if __name__ == "__main__":
    main()

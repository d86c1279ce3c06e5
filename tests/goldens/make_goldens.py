"""Make the goldens: small random models as transformers writes them, and what transformers + torch computes with them.

    make goldens

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
SEEDS = {"gpt2": (0, 1), "llama": (0, 1), "stablelm": (318, 111)}  # StableLM's: every option off, and every one on


def main() -> None:
    """Write two goldens of each family."""
    for family, seeds in SEEDS.items():
        for number, seed in enumerate(seeds):
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

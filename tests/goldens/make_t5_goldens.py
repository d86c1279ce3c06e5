"""Make the T5 goldens: small random T5s as transformers writes them, and what transformers + torch computes with them.

    PYTHONPATH=.parity python tests/goldens/make_t5_goldens.py

Each folder holds `config.json`, `model.safetensors` and `expected.safetensors` (sources with their mask, targets,
logits, attention weights, greedy and beam outputs; `tests/parity/t5_reference.py` has their shapes).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))

import reference
import t5_reference

HERE = Path(__file__).parent
KINDS = (  # of v1.1, and of the first T5
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 2, "num_decoder_layers": 2},
    {"feed_forward_proj": "relu", "tie_word_embeddings": True, "num_layers": 1, "num_decoder_layers": 2},
)
SEEDS = (2, 0)  # of outputs that try something


def main() -> None:
    """Write two goldens."""
    for index, (kind, seed) in enumerate(zip(KINDS, SEEDS, strict=True)):
        folder = HERE / f"t5-{index}"
        shutil.rmtree(folder, ignore_errors=True)
        rng = np.random.default_rng([seed, 5])
        sizes = {"d_model": 16, "d_kv": 5, "num_heads": 2, "relative_attention_num_buckets": 8}
        config = t5_reference.random_config(rng, **sizes, relative_attention_max_distance=10, **kind)
        model = t5_reference.random_model(config, seed)
        reference.save(model, folder)
        source, mask = t5_reference.random_sources(rng, config.vocab_size)
        target = rng.integers(2, config.vocab_size, (4, 14))
        target[:, 0] = config.decoder_start_token_id
        expected = t5_reference.compute(model, source, mask, target)
        save_file(
            {name: np.ascontiguousarray(value) for name, value in expected.items()}, folder / "expected.safetensors"
        )
        print(f"{folder.name}: {model.num_parameters()} parameters, generated {expected['generated'].tolist()}")
        print("beams", expected["beams"][0].tolist())


if __name__ == "__main__":
    main()

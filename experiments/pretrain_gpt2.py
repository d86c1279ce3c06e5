"""Pretrain the embedded `tiny-gpt2` on free English text, and compare it with an n-gram model of the same text.

python -m experiments.pretrain_gpt2 --preset quick    # measure the embedded model again, redraw its training
make corpus
python -m experiments.pretrain_gpt2 --preset full     # train it: an hour or two on 2 cores; resumes by itself
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tqdm import tqdm  # noqa: E402

from experiments import ledger, model_card  # noqa: E402
from jaxrl_llm import models  # noqa: E402
from jaxrl_llm.analysis.metrics import bits_per_byte  # noqa: E402
from jaxrl_llm.analysis.ngram import KneserNey  # noqa: E402
from jaxrl_llm.data import bpe, corpus  # noqa: E402
from jaxrl_llm.decoding import generate  # noqa: E402
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopP  # noqa: E402
from jaxrl_llm.language_model import Params  # noqa: E402
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config  # noqa: E402
from jaxrl_llm.training import pretrain  # noqa: E402
from jaxrl_llm.training.optimizers import muon  # noqa: E402
from jaxrl_llm.training.run_log import RunLog  # noqa: E402

EMBEDDED = Path(models.__file__).parent / "embedded" / "tiny-gpt2"
NGRAM_ORDERS = (2, 3, 4, 5)
PROBE_PARTS = 8  # pieces of the held-out stream that are evaluated during training, 8 windows each


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; with the corpus it decides every number."""

    train: bool = False
    corpus: Path = Path("corpus/corpus.jsonl")
    work_dir: Path = Path("runs/tiny-gpt2")
    seed: int = 0
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


PRESETS = {"quick": Config(), "full": Config(train=True)}


def trained_tokenizer(config: Config, documents: list[corpus.Document]) -> Tokenizer:
    """The run's tokenizer, trained once."""
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
    """What tells one stream of tokens from another."""
    return hashlib.sha256(np.ascontiguousarray(data)).hexdigest()


def train(config: Config) -> None:
    """Train or resume, evaluate on all held-out text, and write the embedded model with its log and card."""
    documents, held_out = corpus.split(corpus.load(config.corpus))
    tokenizer = trained_tokenizer(config, documents)
    data = bpe.stream(tokenizer, [document.text for document in documents])
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    lm = GPT2(GPT2Config(**sizes))
    fields = {name: value for name, value in dataclasses.asdict(config).items() if not isinstance(value, Path)}
    state = pretrain.fit(
        lm,
        muon(
            config.learning_rate,
            steps=config.steps,
            warmup_steps=config.warmup_steps,
            decay_steps=config.decay_steps,
            weight_decay=config.weight_decay,
        ),
        data,
        key=jax.random.key(config.seed),
        steps=config.steps,
        batch_size=config.batch_size,
        time=config.n_positions,
        folder=config.work_dir,
        evaluate=probe(lm, bpe.stream(tokenizer, [document.text for document in held_out])),
        evaluate_every=config.eval_every,
        config=fields | {"data": digest(data)},
    )
    bpe.save(tokenizer, EMBEDDED)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    models.save(EMBEDDED, lm, state.params, config=ids, dtype=jnp.float16)
    loaded = models.load(EMBEDDED)  # from here on, what is measured is what is stored
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
    (EMBEDDED / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (EMBEDDED / "README.md").write_text(model_card.render(loaded.model.num_params(), record), encoding="utf-8")


def probe(lm: GPT2, held_out: np.ndarray) -> Any:
    """A cheap held-out loss for the log: nats a token over pieces at equal distances."""
    time = lm.max_length
    starts = np.linspace(0, len(held_out) - 8 * time - 1, PROBE_PARTS).astype(int)
    parts = [held_out[start : start + 8 * time + 1] for start in starts]

    def loss(params: Params) -> float:
        nats = [pretrain.held_out_nats(lm, params, part, time=time) for part in parts]
        return sum(total for total, _ in nats) / sum(count for _, count in nats)

    return loss


def evaluate(
    loaded: models.Loaded, tokenizer: Tokenizer, data: np.ndarray, held_out: list[corpus.Document]
) -> list[dict[str, Any]]:
    """For each source: bytes, tokens, and the nats of the model and of n-gram models of the training text."""
    ngrams = {
        order: KneserNey.fit(data, order=order, vocab_size=loaded.model.vocab_size)
        for order in tqdm(NGRAM_ORDERS, unit="n-gram model")
    }
    rows = []
    for source in tqdm(dict.fromkeys(document.source for document in held_out), unit="source"):
        texts = [document.text for document in held_out if document.source == source]
        stream = bpe.stream(tokenizer, texts)
        nats, count = pretrain.held_out_nats(loaded.model, loaded.params, stream, time=loaded.model.max_length)
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
    """Held-out text that may be given to everyone: the beginnings of the public-domain sources."""
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
    """Bits per UTF-8 byte of some documents, `<|endoftext|>` between them included."""
    texts = [document.text for document in documents]
    stream = bpe.stream(tokenizer, texts)
    nats, _ = pretrain.held_out_nats(loaded.model, loaded.params, stream, time=loaded.model.max_length)
    return bits_per_byte(nats, sum(len(text.encode()) for text in texts))


def continuations(loaded: models.Loaded) -> list[dict[str, str]]:
    """What it writes: temperature 0.8, nucleus 0.9, seed 0, not chosen by hand."""
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


def run(config: Config) -> dict[str, Any]:
    """Train if asked to; then measure what is embedded, and report it beside its training."""
    if config.train:
        train(config)
    loaded = models.load("tiny-gpt2")
    record = json.loads((EMBEDDED / "training.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    sample = [corpus.Document(**document) for document in record["sample"]]
    measured = text_bits_per_byte(loaded, tokenizer, sample)
    totals = model_card.totals(record)
    best_order = min(totals["ngram_bits_per_byte"], key=totals["ngram_bits_per_byte"].get)
    ngram = totals["ngram_bits_per_byte"][best_order]
    megabytes = sum(path.stat().st_size for path in EMBEDDED.iterdir()) / 2**20
    source = "training.json: all held-out documents"
    numbers = [
        ledger.number(
            "held-out bits per byte, tiny-gpt2",
            totals["bits_per_byte"],
            interval=(0.0, ngram),
            unit="bits per byte",
            source=source,
        ),
        ledger.number(f"held-out bits per byte, {best_order}-gram", ngram, unit="bits per byte", source=source),
        ledger.number("held-out loss", totals["nats_per_token"], unit="nats per token", source=source),
        ledger.number(
            "bits per byte of the held-out sample, measured now",
            measured,
            expected=record["sample_bits_per_byte"],
            tolerance=1e-3,
            unit="bits per byte",
            source="training.json",
        ),
        ledger.number(
            "parameters",
            loaded.model.num_params() / 1e6,
            interval=(3.0, 6.0),
            unit="million",
            source="the model's shapes",
        ),
        ledger.number("size of the folder", megabytes, interval=(0.0, 12.0), unit="MiB", source="its files"),
    ]
    return {
        "claim": f"A GPT-2 of {loaded.model.num_params() / 1e6:.1f} million parameters, trained here on "
        f"{record['train_bytes'] / 1e6:.0f} MB of free English text, predicts held-out text better than the best "
        f"n-gram model of the same text: {totals['bits_per_byte']:.3f} against {ngram:.3f} bits per byte.",
        "numbers": numbers,
        "data": {
            "log": record["log"],
            "ngram_nats_per_token": {order: nats for order, nats in totals["ngram_nats_per_token"].items()},
            "best_order": best_order,
            "sources": totals["sources"],
            "continuations": record["continuations"],
        },
    }


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/pretrain_gpt2.json`.

    Args:
        preset: quick measures the embedded model; full trains it first, which needs `make corpus`.
    """
    ledger.run_and_write("pretrain_gpt2", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)

"""Pretrain the embedded `tiny-gpt2` on public-domain English, and compare it with an n-gram model of the same text.

make corpus
python -m experiments.pretrain_gpt2 --preset full     # hours on 2 cores; resumes from its last checkpoint
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tqdm import tqdm  # noqa: E402

from jaxrl_llm.data import bpe, corpus  # noqa: E402
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config  # noqa: E402
from jaxrl_llm.training import pretrain  # noqa: E402
from jaxrl_llm.training.checkpoints import Checkpoints  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """One run; with the corpus it decides every number."""

    corpus: Path = Path("corpus/corpus.jsonl")
    work_dir: Path = Path("runs/tiny-gpt2")
    seed: int = 0
    vocab_size: int = 4096
    n_positions: int = 256
    n_embd: int = 256
    n_layer: int = 4
    n_head: int = 4
    batch_size: int = 16
    steps: int = 2200
    warmup_steps: int = 50
    decay_steps: int = 600
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    eval_every: int = 100


def optimizer(config: Config) -> optax.GradientTransformation:
    """Muon on the weight matrices, Adam on embeddings, norms and biases; warm-up, plateau, linear decay to 0."""

    def is_matrix(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def dimension_numbers(params):
        return jax.tree.map(lambda matrix: optax.contrib.MuonDimensionNumbers() if matrix else None, is_matrix(params))

    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, config.decay_steps),
        ],
        [config.warmup_steps, config.steps - config.decay_steps],
    )
    muon = optax.contrib.muon(
        schedule,
        adam_b2=0.95,
        weight_decay=config.weight_decay,
        weight_decay_mask=is_matrix,
        muon_weight_dimension_numbers=dimension_numbers,
        consistent_rms=0.2,  # updates of the size that Adam's would have, so that one learning rate serves both
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def tokenize(config: Config) -> tuple[Tokenizer, np.ndarray, np.ndarray, int]:
    """The tokenizer (trained once), the training and held-out streams, and the UTF-8 bytes of the held-out text."""
    train, held_out = corpus.split(corpus.load(config.corpus))
    path = config.work_dir / "tokenizer.json"
    if not path.exists():
        config.work_dir.mkdir(parents=True, exist_ok=True)
        bpe.train((document.text for document in train), config.vocab_size).save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    streams = (bpe.stream(tokenizer, [document.text for document in documents]) for documents in (train, held_out))
    return tokenizer, *streams, sum(len(document.text.encode()) for document in held_out)


def model(config: Config) -> GPT2:
    """The GPT-2 of a run."""
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    return GPT2(GPT2Config(**sizes))


def train(config: Config, lm: GPT2, data: np.ndarray, held_out: np.ndarray) -> pretrain.TrainState:
    """Train, or go on from the last checkpoint; one line of `log.jsonl` per evaluation."""
    params_key, batch_key = jax.random.split(jax.random.key(config.seed))
    tx = optimizer(config)
    params = lm.init(params_key)
    state = pretrain.TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))
    checkpoints = Checkpoints(config.work_dir / "checkpoints")
    log = Log(config.work_dir / "log.jsonl")
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(state)
    log.truncate(int(state.step))
    step_fn = pretrain.make_train_step(lm, tx, batch_size=config.batch_size, time=config.n_positions)
    data, started, losses = jnp.asarray(data), time.perf_counter(), []
    probe = held_out_probe(held_out, config.n_positions)
    progress = tqdm(range(int(state.step), config.steps), initial=int(state.step), total=config.steps, unit="step")
    for step in progress:
        state, loss = step_fn(state, data, batch_key)
        losses.append(float(loss))
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss became {losses[-1]} at step {step + 1}.")
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            nats = [pretrain.held_out_nats(lm, state.params, part, time=config.n_positions) for part in probe]
            held_out_loss = sum(total for total, _ in nats) / sum(count for _, count in nats)
            seconds = time.perf_counter() - started
            tokens = (step + 1) * config.batch_size * config.n_positions
            log.append(
                step=step + 1, tokens=tokens, loss=float(np.mean(losses)), held_out_loss=held_out_loss, seconds=seconds
            )
            checkpoints.save(step + 1, state)
            started, losses = time.perf_counter(), []
    return state


def held_out_probe(held_out: np.ndarray, time: int, *, parts: int = 8) -> list[np.ndarray]:
    """`parts` equally spaced pieces of the held-out stream, 8 windows each: a cheap estimate during training."""
    starts = np.linspace(0, len(held_out) - 8 * time - 1, parts).astype(int)
    return [held_out[start : start + 8 * time + 1] for start in starts]


class Log:
    """A JSON-lines file that never holds lines of steps that a resumed run will do again."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def truncate(self, step: int) -> None:
        kept = [row for row in self.rows() if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)

    def append(self, **row: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    config = Config()
    tokenizer, data, held_out, held_out_bytes = tokenize(config)
    train(config, model(config), data, held_out)

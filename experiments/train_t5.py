"""Train the embedded `tiny-t5` on English to German number names, and test it on names that it has not seen.

python -m experiments.train_t5 --preset quick    # translate the held-out names with the embedded model again
python -m experiments.train_t5 --preset full     # train it: minutes on 2 cores; resumes by itself
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts import t5_card  # noqa: E402
from jaxrl_llm import models, translation  # noqa: E402
from jaxrl_llm.data import number_names, number_tokenizer  # noqa: E402
from jaxrl_llm.models import T5, T5Config  # noqa: E402
from jaxrl_llm.training import loop, seq2seq  # noqa: E402
from jaxrl_llm.training.optimizers import muon  # noqa: E402
from jaxrl_llm.training.run_log import RunLog  # noqa: E402
from jaxrl_llm.training.steps import initial_state  # noqa: E402

EMBEDDED = Path(models.__file__).parent / "embedded" / "tiny-t5"
LONGEST = 12  # tokens of the longest name, with its end
BATCHES_OF_HELD_OUT = 8
EXAMPLES = (21, 1_001, 87_654, 321_987, 999_999)  # shown in the card, whatever comes out


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: it decides every number."""

    train: bool = False
    work_dir: Path = Path("runs/tiny-t5")
    seed: int = 0
    d_model: int = 128
    d_ff: int = 256
    num_layers: int = 2
    num_decoder_layers: int = 2
    num_heads: int = 4
    batch_size: int = 128
    steps: int = 600
    warmup_steps: int = 50
    decay_steps: int = 300
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    eval_every: int = 50


PRESETS = {"quick": Config(), "full": Config(train=True)}
TOKENIZER = number_tokenizer.build()


def model_of(config: Config) -> T5:
    """The T5 of a run; its relative positions reach as far as a name."""
    return T5(
        T5Config(
            vocab_size=TOKENIZER.get_vocab_size(),
            d_model=config.d_model,
            d_kv=config.d_model // config.num_heads,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=16,
        )
    )


def encoded(numbers: np.ndarray) -> seq2seq.PairBatch:
    """The English names and the German ones, as tokens."""
    pairs = [number_names.pair(number) for number in numbers]
    sides = ([pair.source_text for pair in pairs], [pair.target_text for pair in pairs])
    rows = ([each.ids for each in TOKENIZER.encode_batch(texts)] for texts in sides)
    return seq2seq.pad_pairs(*rows, multiple=LONGEST)


class Names:
    """Training batches: a length of 1 to 9 English words, each as likely, then a number of that length.

    Drawn uniformly, hardly any name would be short.
    """

    def __init__(self, numbers: np.ndarray, *, batch_size: int, seed: int):
        lengths = number_names.english_lengths(numbers)
        self._numbers = [numbers[lengths == length] for length in np.unique(lengths)]
        self._batch_size, self._seed = batch_size, seed
        self._counts: list[int] = []

    def __call__(self, step: int) -> seq2seq.PairBatch:
        """The batch of a step, which depends on the seed and the step alone."""
        rng = np.random.default_rng([self._seed, step])
        return encoded(np.asarray([rng.choice(self._numbers[i]) for i in rng.integers(0, 9, self._batch_size)]))

    def tokens(self, steps: int) -> int:
        """How many target tokens the first so many steps predict."""
        self._counts += [int(self(step).target_mask.sum()) for step in range(len(self._counts), steps)]
        return sum(self._counts[:steps])


def train(config: Config) -> None:
    """Train or resume, translate every held-out name, and write the embedded model with its log and card."""
    model, split = model_of(config), number_names.split()
    schedule = {name: getattr(config, name) for name in ("steps", "warmup_steps", "decay_steps", "weight_decay")}
    optimizer = muon(config.learning_rate, **schedule)
    step = seq2seq.make_pair_step(model, optimizer)
    batches = Names(split.train, batch_size=config.batch_size, seed=config.seed)
    held_out = [encoded(part) for part in np.array_split(split.held_out[::2], BATCHES_OF_HELD_OUT)]
    held_out_loss = seq2seq.held_out_loss(model, held_out)
    fields = {name: value for name, value in dataclasses.asdict(config).items() if not isinstance(value, Path)}
    key = jax.random.key(config.seed)
    state = loop.run(
        initial_state(model.init(key), optimizer, key),
        lambda state, done: step(state, batches(done)),
        steps=config.steps,
        folder=config.work_dir,
        tokens=batches.tokens,
        evaluate=lambda params: {"held_out_loss": held_out_loss(params)},
        evaluate_every=config.eval_every,
        config=fields,
    )
    ids = {"eos_token_id": number_tokenizer.EOS_ID, "pad_token_id": number_tokenizer.PAD_ID}
    models.save(EMBEDDED, model, state.params, config=ids, dtype=jnp.float16)
    number_tokenizer.save(TOKENIZER, EMBEDDED)
    loaded = models.load(EMBEDDED)  # from here on, what is measured is what is stored
    record = {
        "config": fields,
        "log": RunLog(config.work_dir / "log.jsonl").rows(),
        "train_names": len(split.train),
        "exact": exact_by_length(loaded, split.held_out),
        "examples": examples(loaded),
    }
    (EMBEDDED / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (EMBEDDED / "README.md").write_text(t5_card.render(model.num_params(), record), encoding="utf-8")


def exact_by_length(loaded: models.Loaded, numbers: np.ndarray) -> list[dict[str, int]]:
    """For each length in English words: how many names there are, and how many greedy decoding translates exactly."""
    pairs = [number_names.pair(number) for number in numbers]
    found = translation.translate(loaded, [pair.source_text for pair in pairs], max_new_tokens=16, batch_size=256)
    right = np.asarray([text == pair.target_text for text, pair in zip(found, pairs, strict=True)])
    lengths = number_names.english_lengths(numbers)
    return [
        {"words": int(words), "names": int((lengths == words).sum()), "exact": int(right[lengths == words].sum())}
        for words in np.unique(lengths)
    ]


def examples(loaded: models.Loaded) -> list[dict[str, str]]:
    """Some translations, not chosen by how they come out."""
    sources = [number_names.pair(number).source_text for number in EXAMPLES]
    found = translation.translate(loaded, sources, max_new_tokens=16)
    return [{"source": source, "translation": text} for source, text in zip(sources, found, strict=True)]


def run(config: Config) -> dict[str, Any]:
    """Train if asked to; then measure what is embedded, and report it beside its training."""
    if config.train:
        train(config)
    loaded, split = models.load("tiny-t5"), number_names.split()
    record = json.loads((EMBEDDED / "training.json").read_text(encoding="utf-8"))
    rows = exact_by_length(loaded, split.held_out)
    names, exact = (sum(row[field] for row in rows) for field in ("names", "exact"))
    seen = exact_by_length(loaded, np.random.default_rng(config.seed).choice(split.train, 1000, replace=False))
    megabytes = sum(path.stat().st_size for path in EMBEDDED.iterdir()) / 2**20
    source = "translated now by greedy decoding"
    numbers = [
        ledger.number("held-out names, exact", exact / names, interval=(0.99, 1.0), unit="share", source=source),
        ledger.number("held-out names", names, interval=(1000, None), unit="names", source="number_names.split"),
        ledger.number(
            "held-out names that are exact now but were not in training.json, or the reverse",
            sum(abs(now["exact"] - then["exact"]) for now, then in zip(rows, record["exact"], strict=True)),
            expected=0,
            tolerance=0,
            unit="names",
            source="training.json",
        ),
        ledger.number(
            "1,000 training names drawn uniformly, exact",
            sum(row["exact"] for row in seen) / 1000,
            unit="share",
            source=source,
        ),
        ledger.number("parameters", loaded.model.num_params() / 1e6, unit="million", source="the model's shapes"),
        ledger.number("size of the folder", megabytes, interval=(0.0, 6.0), unit="MiB", source="its files"),
    ]
    return {
        "claim": f"A T5 of {loaded.model.num_params() / 1e6:.2f} million parameters, trained here, translates "
        f"{exact:,} of {names:,} number names that it has not seen from English to German without a mistake.",
        "numbers": numbers,
        "data": {"log": record["log"], "exact": rows, "examples": examples(loaded)},
    }


def main(preset: Literal["quick", "full"] = "quick") -> None:
    """Write `results/train_t5.json`.

    Args:
        preset: quick measures the embedded model; full trains it first.
    """
    ledger.run_and_write("train_t5", run, PRESETS[preset], preset)


if __name__ == "__main__":
    tyro.cli(main)

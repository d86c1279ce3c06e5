"""Train `tiny-t5` on English to German number names, and test it on names that it has not seen.

python -m experiments.train_t5 --preset quick          # translate a fifth of the held-out names with the shipped model
python -m experiments.train_t5 --preset full           # translate all of them
python -m experiments.train_t5 --preset full --train   # train it anew: minutes on 2 cores; resumes by itself

`--train` writes the model to the work directory, and only `--replace-embedded` writes it over that of the package.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import embedded, ledger, statistics
from experiments.frame import experiment
from jaxrl_llm import models, translation
from jaxrl_llm.data import number_names
from jaxrl_llm.models import T5, T5Config
from jaxrl_llm.training import loop, supervised
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.steps import initial_state, muon

NAME = "tiny-t5"
LEAST_EXACT = 0.99  # share of the names that are claimed to be translated without a mistake
LONGEST = 12  # tokens of the longest name, with its end
BATCHES_OF_HELD_OUT = 8
EXAMPLES = (21, 1_001, 87_654, 321_987, 999_999)  # shown in the card, whatever comes out


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run, which determine every number."""

    train: bool = False
    """Train a model first, and write it to the work directory."""
    replace_embedded: bool = False
    """With --train: write it over the model of the package, with its card."""
    every: int = 1
    """Translate every n-th of the held-out names."""
    work_dir: Path = Path("runs/tiny-t5")
    """The folder for checkpoints and a trained model."""
    training_seed: int = 0
    """Decides the initial parameters and the names of each batch."""
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


NOT_OF_TRAINING = ("train", "replace_embedded", "every", "work_dir", "training_seed")
TOKENIZER = number_names.build_tokenizer()


def model_of(config: Config) -> T5:
    """Return the T5 of a run; its relative positions cover the length of a name."""
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


def encoded(numbers: np.ndarray) -> supervised.Seq2SeqBatch:
    """Return the English names and the German ones, as tokens."""
    pairs = [number_names.pair(number) for number in numbers]
    sides = ([pair.source_text for pair in pairs], [pair.target_text for pair in pairs])
    rows = ([each.ids for each in TOKENIZER.encode_batch(texts)] for texts in sides)
    return supervised.pad_pairs(*rows, multiple=LONGEST)


class Names:
    """Training batches: a length of 1 to 9 English words, each as likely, then a number of that length.

    Drawn uniformly, hardly any name would be short.
    """

    def __init__(self, numbers: np.ndarray, *, batch_size: int, seed: int):
        lengths = number_names.english_lengths(numbers)
        self._numbers = [numbers[lengths == length] for length in np.unique(lengths)]
        self._batch_size, self._seed = batch_size, seed
        self._counts: list[int] = []

    def __call__(self, step: int) -> supervised.Seq2SeqBatch:
        """Return the batch of a step, which depends on the seed and the step alone."""
        rng = np.random.default_rng([self._seed, step])
        return encoded(np.asarray([rng.choice(self._numbers[i]) for i in rng.integers(0, 9, self._batch_size)]))

    def tokens(self, steps: int) -> int:
        """Return the number of target tokens that the first steps predict."""
        self._counts += [int(self(step).target_mask.sum()) for step in range(len(self._counts), steps)]
        return sum(self._counts[:steps])


def train(config: Config, folder: Path) -> None:
    """Train or resume, translate every held-out name, and write the model's folder with its log and card."""
    model, split = model_of(config), number_names.split()
    schedule = {name: getattr(config, name) for name in ("steps", "warmup_steps", "decay_steps", "weight_decay")}
    optimizer = muon(config.learning_rate, **schedule)
    step = supervised.make_pair_step(model, optimizer)
    batches = Names(split.train, batch_size=config.batch_size, seed=config.training_seed)
    held_out = [encoded(part) for part in np.array_split(split.held_out[::2], BATCHES_OF_HELD_OUT)]
    held_out_loss = supervised.held_out_loss(model, held_out)
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in NOT_OF_TRAINING}
    fields = {"seed": config.training_seed} | fields
    key = jax.random.key(config.training_seed)
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
    ids = {"eos_token_id": number_names.EOS_ID, "pad_token_id": number_names.PAD_ID}
    models.save(folder, model, state.params, config=ids, dtype=jnp.float16)
    number_names.save_tokenizer(TOKENIZER, folder)
    loaded = models.load(folder)  # from here on, what is measured is what is stored
    record = {
        "config": fields,
        "log": RunLog(config.work_dir / "log.jsonl").rows(),
        "train_names": len(split.train),
        "exact": exact_by_length(loaded, split.held_out),
        "examples": examples(loaded),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(model.num_params(), record), encoding="utf-8")


def exact_by_length(loaded: models.Loaded, numbers: np.ndarray) -> list[dict[str, int]]:
    """Return, for each length in English words, how many names there are and how many are translated exactly."""
    pairs = [number_names.pair(number) for number in numbers]
    found = translation.translate(loaded, [pair.source_text for pair in pairs], max_new_tokens=16, batch_size=256)
    right = np.asarray([text == pair.target_text for text, pair in zip(found, pairs, strict=True)])
    lengths = number_names.english_lengths(numbers)
    return [
        {"words": int(words), "names": int((lengths == words).sum()), "exact": int(right[lengths == words].sum())}
        for words in np.unique(lengths)
    ]


def nats_by_length(loaded: models.Loaded, numbers: np.ndarray) -> list[dict[str, Any]]:
    """Return, for each length in English words, the surprise of the gold German name: median and largest, in nats."""
    nats = jax.jit(lambda params, batch: -jnp.where(batch.target_mask, log_probs(params, batch), 0.0).sum(axis=1))
    log_probs = functools.partial(supervised.target_log_probs, loaded.model)
    surprise = np.asarray(nats(loaded.params, encoded(numbers)))
    lengths = number_names.english_lengths(numbers)
    return [
        {
            "words": int(words),
            "median": float(np.median(surprise[lengths == words])),
            "largest": float(surprise[lengths == words].max()),
        }
        for words in np.unique(lengths)
    ]


def examples(loaded: models.Loaded) -> list[dict[str, str]]:
    """Return some translations, not chosen by their quality."""
    sources = [number_names.pair(number).source_text for number in EXAMPLES]
    found = translation.translate(loaded, sources, max_new_tokens=16)
    return [{"source": source, "translation": text} for source, text in zip(sources, found, strict=True)]


@experiment(quick=Config(every=5), full=Config())
def run(config: Config) -> dict[str, Any]:
    """Train if asked to; then translate held-out names with the model, and report it beside its training."""
    folder = embedded.folder(config, NAME)
    if config.train:
        train(config, folder)
    loaded, numbers = models.load(folder), number_names.split().held_out[:: config.every]
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    rows = exact_by_length(loaded, numbers)
    names, exact = (sum(row[field] for row in rows) for field in ("names", "exact"))
    share, low, high = statistics.share(exact, names)
    millions = loaded.model.num_params() / 1e6
    source = "greedy decoding; interval of Clopper and Pearson over the names"
    return {
        "claim": f"{NAME}, a T5 of {millions:.2f} million parameters from one training run, translates {exact:,} of "
        f"{names:,} number names that it has not seen from English to German without a mistake "
        f"(95% interval of the share: {low:.1%} to {high:.1%}).",
        "numbers": [
            ledger.test(
                "held-out names, exact, lower end of the interval",
                low,
                at_least=LEAST_EXACT,
                wrong=0.95,
                unit="share",
                source=source,
            ),
            ledger.measurement("held-out names, exact", share, low, high, unit="share", source=source),
            ledger.measurement("held-out names", names, unit="names", source="number_names.split"),
            ledger.measurement("parameters", millions, unit="million", source="the model's shapes"),
        ],
        "data": {
            "log": record["log"],
            "exact": rows,
            "nats": nats_by_length(loaded, numbers),
            "examples": examples(loaded),
        },
    }


def card(num_params: int, record: dict[str, Any]) -> str:
    """Return the model card of a training record."""
    rows = record["exact"]
    names, exact = (sum(row[field] for row in rows) for field in ("names", "exact"))
    return embedded.card(
        NAME,
        num_params=num_params,
        config=record["config"],
        record=record,
        names=names,
        exact=exact,
        table=embedded.table_rows((row["words"], row["names"], row["exact"]) for row in rows),
        examples=embedded.table_rows((each["source"], each["translation"]) for each in record["examples"]),
    )

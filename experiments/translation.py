r"""Compare an encoder-decoder with a decoder-only model in translation: greedy decoding and beam search, BLEU and chrF.

python -m experiments.translation --preset quick   # translate 50 held-out verses with the two embedded models
python -m experiments.translation --preset full    # translate 256, with more decoders
python -m experiments.translation --preset full --train    # train both anew: 40 minutes on 2 cores; resumes by itself
python -m experiments.translation --preset full --train --source train.en --target train.de --work-dir runs/mine
python -m experiments.translation --preset full --t5 t5-small --gpt mGPT --source test.en --target test.de \
    --t5-prefix "translate English to German: " --gpt-prefix "English: " --gpt-suffix $'\nGerman:'

A small T5 and a small GPT-2 with about as many parameters are trained on the same pairs in the same batches, so that
both see the same target tokens. The GPT-2 reads source, separator and target as one sequence, with the loss on the
target alone. Without files of one's own the pairs are English and Spanish verses, held out by chapter.

`--train` writes models to the work directory, and only `--replace-embedded` writes them over those of the package.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, processors
from tqdm import tqdm

from experiments import embedded, ledger
from experiments.frame import experiment
from jaxrl_llm import models, translation
from jaxrl_llm.analysis import bleu, bootstrap
from jaxrl_llm.analysis.bootstrap import Interval
from jaxrl_llm.data import bpe, parallel, verses
from jaxrl_llm.data.parallel import SentencePair
from jaxrl_llm.models import GPT2, T5, GPT2Config, Loaded, T5Config
from jaxrl_llm.models.decoder import Network
from jaxrl_llm.training import loop, supervised
from jaxrl_llm.training.loop import RunLog
from jaxrl_llm.training.steps import initial_state, muon
from jaxrl_llm.translation import Form

FOLDERS = {"t5": "tiny-t5-verses", "gpt2": "tiny-gpt2-verses"}  # of the two models in the package
SEPARATOR = "\n"  # between a source and its target, in the one sequence of the decoder-only model
CONTEXT = 128  # tokens of the decoder-only model: source, separator and target
EXAMPLES = 6  # the first pairs, whatever comes out
ENOUGH = 25  # sentences, below which a bootstrap interval is too narrow to be shown
SEED = 0  # of the bootstrap
NAMES = {"t5": "T5", "gpt2": "decoder-only"}
MEASURES = {
    "BLEU": (bootstrap.bleu_interval, bootstrap.bleu_difference),
    "chrF": (bootstrap.chrf_interval, bootstrap.chrf_difference),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run, which with the pairs determine every number."""

    train: bool = False
    """Train both models first, and write them to the work directory."""
    replace_embedded: bool = False
    """With --train: write the models of the verses over those of the package, with their cards."""
    t5: str | None = None
    """A T5 to translate with: a folder or a name."""
    gpt: str | None = None
    """A decoder-only model to compare it with."""
    source: Path | None = None
    """Sentences, one a line, or both sides as .tsv or .jsonl."""
    target: Path | None = None
    """Their translations, one a line."""
    t5_prefix: str | None = None
    """Text before each sentence, such as "translate English to German: "."""
    gpt_prefix: str | None = None
    """The same for the decoder-only model."""
    gpt_suffix: str | None = None
    """Text after each sentence, after which the decoder-only model is to write the translation."""
    work_dir: Path = Path("runs/translation")
    """The folder for checkpoints and trained models."""
    training_seed: int = 0
    """Decides the initial parameters, the order of the pairs, and which lines of your files are held out."""
    sentences: int = 50
    """Number of sentences that are translated."""
    sentences_at_once: int = 25
    held_out: int = 400
    """Lines of your files that are held out for validation, and as many for testing."""
    limit: int = 32
    """Tokens of the longest sentence in training, on either side."""
    test_limit: int = 24
    """Tokens of the longest sentence that is translated, on either side."""
    beams: tuple[int, ...] = (1, 2)
    penalties: tuple[float, ...] = (0.0, 1.0, 2.0)
    beams_of_penalties: int = 2
    """The number of beams at which length penalties are compared, and the models."""
    length_penalty: float = 1.0
    """The length penalty at which numbers of beams are compared, and the models."""
    new_tokens: int = 32
    resamples: int = 1000
    """Number of bootstrap samples of the sentences."""
    vocab_size: int = 4096
    width: int = 160
    layers: int = 2
    """Layers of encoder and decoder each; the decoder-only model has twice as many."""
    heads: int = 4
    batch_size: int = 64
    steps: int = 600
    warmup_steps: int = 50
    decay_steps: int = 300
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    eval_every: int = 100


FULL = Config(
    sentences=256,
    sentences_at_once=32,
    test_limit=31,  # 32 with the separator, which decoders pad less
    beams=(1, 2, 4, 8),
    penalties=(0.0, 0.5, 1.0, 1.5, 2.0),
    beams_of_penalties=4,
    new_tokens=40,
)


def named(name: str, config: Config) -> str:
    """Name the results of other models after the T5, and those of models trained on other text after its file."""
    own = config.t5 or (config.source and config.source.stem)
    return name if own is None else ledger.result_name(name, Path(own).name)


@experiment(quick=Config(), full=FULL, named=named)
def run(config: Config) -> dict[str, Any]:
    """Train if asked to; translate the test pairs with every decoder; score and compare."""
    folders = folders_of(checked(config))
    if config.train:
        train(config, folders)
    if config.t5 is not None:
        folders = {"t5": config.t5, "gpt2": config.gpt}
    loaded = {name: models.load(folder) for name, folder in folders.items()}
    forms = {
        "t5": Form.of(loaded["t5"], prefix=config.t5_prefix),
        "gpt2": Form.of(loaded["gpt2"], prefix=config.gpt_prefix, suffix=config.gpt_suffix),
    }
    pairs = test_pairs(config, loaded["t5"])
    found = {name: translations(config, loaded[name], forms[name], pairs) for name in loaded}
    labels = {name: label(name, folder, loaded[name]) for name, folder in folders.items()}
    records = {} if config.t5 is not None else training_records(folders)
    result = report(config, labels, loaded, found, pairs, records)
    if config.train and config.source is None:
        for name, folder in folders.items():
            text = card(name, folder.name, loaded[name].model.num_params(), records[name], result["data"])
            (folder / "README.md").write_text(text, encoding="utf-8")
    return result


# Training -------------------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """Pairs to train on, to choose by and to report on."""

    train: Sequence[SentencePair]
    validation: Sequence[SentencePair]
    test: Sequence[SentencePair]


def pairs_of(config: Config) -> Parts:
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


def networks(config: Config) -> dict[str, Network]:
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
                **shared, n_positions=CONTEXT, n_embd=config.width, n_layer=2 * config.layers, n_head=config.heads
            )
        ),
    }


def train(config: Config, folders: dict[str, Path]) -> None:
    """Train both models, or resume, and write them to their folders, each with the record of its training.

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


def _trained(
    config: Config, name: str, model: Network, rows: tuple, held_out: tuple
) -> tuple[Any, list[dict[str, Any]]]:
    folder = config.work_dir / name
    schedule = {field: getattr(config, field) for field in ("steps", "warmup_steps", "decay_steps", "weight_decay")}
    optimizer = muon(config.learning_rate, **schedule)
    step = supervised.make_pair_step(model, optimizer)
    epochs = supervised.Epochs(*rows, batch_size=config.batch_size, seed=config.training_seed, multiple=12)
    size = config.batch_size
    batches = [
        supervised.pad_pairs(*(side[start : start + size] for side in held_out), multiple=12)
        for start in range(0, min(len(held_out[0]), 4 * size), size)
    ]
    held_out_loss = supervised.held_out_loss(model, batches)
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


def _identity(config: Config) -> dict[str, Any]:
    """Return the fields that decide a run."""
    fields = ("limit", "vocab_size", "width", "layers", "heads", "batch_size", "steps", "warmup_steps")
    fields += ("decay_steps", "learning_rate", "weight_decay")
    return {"seed": config.training_seed} | {name: getattr(config, name) for name in fields}


def _record(config: Config, folder: Path, log: list[dict[str, Any]], counts: dict[str, int]) -> None:
    record = {"config": _identity(config), **counts, "log": log}
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def training_records(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return the training records of the models of these folders."""
    return {
        name: json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
        for name, folder in folders.items()
    }


def folders_of(config: Config) -> dict[str, Path]:
    """Return the folders of the two models: those of the verses, or of your files."""
    if config.source is not None:
        return {name: config.work_dir / FOLDERS[name].removesuffix("-verses") for name in FOLDERS}
    return {name: embedded.folder(config, FOLDERS[name]) for name in FOLDERS}


def test_pairs(config: Config, loaded: models.Loaded) -> list[SentencePair]:
    """Return the first held-out pairs that are short enough; of a user's test files all, up to `sentences`."""
    if config.t5 is not None:
        return parallel.read_pairs(config.source, config.target)[: config.sentences]
    pairs = pairs_of(config).test
    short = short_pairs(loaded.tokenizer.backend_tokenizer, pairs, config.test_limit)
    if not short:
        raise ValueError(f"no held-out pair has at most {config.test_limit} tokens on either side.")
    return short[: config.sentences]


def checked(config: Config) -> Config:
    """Return the configuration, if its parts belong together.

    Raises:
        ValueError: if only one of two models or files is given, models are without files, or files without a use.
    """
    for one, other in (("t5", "gpt"), ("source", "target")):
        if (getattr(config, one) is None) != (getattr(config, other) is None):
            raise ValueError(f"--{one} and --{other} belong together: give both.")
    if config.t5 is not None and (config.source is None or config.train):
        raise ValueError("--t5 and --gpt need --source and --target, and are not trained: leave --train out.")
    if config.t5 is None and config.source is not None and not config.train:
        raise ValueError("--source and --target need --train, which trains on them, or --t5 and --gpt.")
    if config.replace_embedded and config.source is not None:
        raise ValueError("--replace-embedded is for models of the verses, not of --source and --target.")
    return config


# Scores ---------------------------------------------------------------------------------------------------------------


class Decoder(NamedTuple):
    """Beams (1 is greedy) and the exponent of the length by which their scores are divided."""

    beams: int
    penalty: float


class Decoded(NamedTuple):
    """A decoder's translations, and the seconds for all of them; None where there was only one batch."""

    texts: list[str]
    seconds: float | None


def decoders(config: Config) -> list[Decoder]:
    """Return every number of beams at one length penalty, and every length penalty at one number of beams."""
    wide = [Decoder(beams, config.length_penalty) for beams in config.beams]
    return list(dict.fromkeys([*wide, *(Decoder(config.beams_of_penalties, each) for each in config.penalties)]))


def label(name: str, folder: str | Path, loaded: Loaded) -> str:
    """Return the name of a model in tables and figures."""
    return f"{Path(folder).name} ({NAMES[name]}, {loaded.model.num_params() / 1e6:.2f}M)"


def translations(config: Config, loaded: Loaded, form: Form, pairs: Sequence[SentencePair]) -> dict[Decoder, Decoded]:
    """Return each decoder's translations, timed from the second batch on: in the first the program compiles."""
    sources, size, found = [pair.source for pair in pairs], config.sentences_at_once, {}
    for decoder in tqdm(decoders(config), unit="decoder"):
        options = {"num_beams": decoder.beams, "length_penalty": decoder.penalty, "max_new_tokens": config.new_tokens}
        translate = functools.partial(translation.translate, loaded, form=form, batch_size=size, **options)
        texts = translate(sources[:size])
        started = time.perf_counter()
        texts += translate(sources[size:])
        timed = len(sources[size:])
        seconds = (time.perf_counter() - started) * len(sources) / timed if timed else None
        found[decoder] = Decoded(texts, seconds)
    return found


def table(config: Config, labels: dict[str, str], found: dict[str, dict], pairs: Sequence[SentencePair]) -> list[dict]:
    """Return one row for each model and decoder, with 95% bootstrap intervals over the sentences."""
    references, rows = [pair.target for pair in pairs], []
    for name, decoded in found.items():
        for decoder, (texts, seconds) in decoded.items():
            counts = bleu.count(texts, references)
            lengths = [sum(getattr(each, field) for each in counts) for field in ("length", "reference_length")]
            scores = {
                measure.lower(): _shown(interval(texts, references, seed=SEED, resamples=config.resamples), pairs)
                for measure, (interval, _) in MEASURES.items()
            }
            rows.append(
                {"model": labels[name], "kind": name, "beams": decoder.beams, "length_penalty": decoder.penalty}
                | {"bleu": scores["bleu"], "chrf": scores["chrf"]}
                | {"length_ratio": lengths[0] / lengths[1], "seconds": seconds and round(seconds, 2)}
            )
    return rows


def leads(config: Config, found: dict[str, dict], pairs: Sequence[SentencePair]) -> list[dict[str, Any]]:
    """Return, for each decoder, how much higher the decoder-only model scores than the T5, paired by sentence."""
    rows = []
    for decoder in decoders(config):
        models = [found[name][decoder].texts for name in ("gpt2", "t5")]
        found_leads = {measure.lower(): _difference(config, measure, *models, pairs) for measure in MEASURES}
        rows.append({"beams": decoder.beams, "length_penalty": decoder.penalty} | found_leads)
    return rows


def _difference(
    config: Config, measure: str, first: list[str], second: list[str], pairs: Sequence[SentencePair]
) -> Any:
    references, (_, difference) = [pair.target for pair in pairs], MEASURES[measure]
    return _shown(difference(first, second, references, seed=SEED, resamples=config.resamples), pairs)


def _shown(interval: Interval, pairs: Sequence[SentencePair]) -> dict[str, float]:
    """Return an estimate, with its interval if there are enough sentences for one."""
    return interval._asdict() if len(pairs) >= ENOUGH else {"estimate": interval.estimate}


def report(
    config: Config,
    labels: dict[str, str],
    loaded: dict[str, Loaded],
    found: dict[str, dict[Decoder, Decoded]],
    pairs: Sequence[SentencePair],
    records: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Return the result in the ledger's form; `records` are those of the models' training, where it was ours."""
    rows, differences = table(config, labels, found, pairs), leads(config, found, pairs)
    at = {"beams": config.beams_of_penalties, "length_penalty": config.length_penalty}
    (lead,) = (row for row in differences if row.items() >= at.items())
    scores = {row["kind"]: row for row in rows if row.items() >= at.items()}
    sizes = [each.model.num_params() for each in loaded.values()]
    numbers = [
        *(tested(config, lead) if records else []),
        *measured(config, lead, scores),
        *gains(config, found, pairs),
        ledger.measurement("sentence pairs", len(pairs), unit="pairs", source="the test part or the files"),
        ledger.measurement(
            "parameters, T5 / decoder-only", sizes[0] / sizes[1], unit="ratio", source="the models' shapes"
        ),
        *(seen(records) if records else []),
    ]
    data = {
        "labels": labels,
        **at,
        "sentences": len(pairs),
        "limit": config.test_limit,
        "table": rows,
        "leads": differences,
        "examples": examples(found, pairs, Decoder(*at.values())),
        "logs": {name: record["log"] for name, record in records.items()},
    }
    short = all(too_short(decoded[Decoder(*at.values())].texts, pairs) for decoded in found.values())
    text = claim(config, labels, lead, scores, len(pairs), ours=bool(records), short=short)
    return {"claim": text, "numbers": numbers, "data": data}


def tested(config: Config, lead: dict[str, Any]) -> list[dict[str, Any]]:
    """Test that the decoder-only model scores higher on the verses, by an interval that is two-sided."""
    if "low" not in lead["bleu"]:
        return []
    name = f"BLEU, decoder-only − T5, beam {config.beams_of_penalties}, lower end of its interval"
    source = "paired bootstrap over the sentences, two-sided 95%"
    return [ledger.test(name, lead["bleu"]["low"], at_least=0.0, wrong=-1.0, unit="points of 100", source=source)]


def measured(config: Config, lead: dict[str, Any], scores: dict[str, dict]) -> list[dict[str, Any]]:
    """Return the scores of both models at one decoder, and their paired differences."""
    beam, numbers = f"beam {config.beams_of_penalties}", []
    for measure in MEASURES:
        for kind, name in NAMES.items():
            score = scores[kind][measure.lower()]
            numbers.append(_measured(f"{measure}, {name}, {beam}", score, "bootstrap over the sentences"))
        name, source = f"{measure}, decoder-only − T5, {beam}", "paired bootstrap over the sentences"
        numbers.append(_measured(name, lead[measure.lower()], source))
    return numbers


def gains(config: Config, found: dict[str, dict], pairs: Sequence[SentencePair]) -> list[dict[str, Any]]:
    """Return the gain of beam search over greedy decoding."""
    numbers = []
    for kind, name in NAMES.items():
        beam, greedy = (
            found[kind][Decoder(beams, config.length_penalty)].texts for beams in (config.beams_of_penalties, 1)
        )
        gain = _difference(config, "BLEU", beam, greedy, pairs)
        name = f"BLEU, {name}, beam {config.beams_of_penalties} − greedy"
        numbers.append(_measured(name, gain, "paired bootstrap over the sentences"))
    return numbers


def _measured(name: str, interval: dict[str, float], source: str) -> dict[str, Any]:
    return ledger.measurement(name, *interval.values(), unit="points of 100", source=source)


def seen(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the amount of training data, which is the same for both models, and their losses."""
    last, source = {name: record["log"][-1] for name, record in records.items()}, "training.json"
    tokens = {name: row["tokens"] for name, row in last.items()}
    losses = (
        ledger.measurement(
            f"validation loss, {name}", last[kind]["held_out_loss"], unit="nats per token", source=source
        )
        for kind, name in NAMES.items()
    )
    difference = tokens["t5"] - tokens["gpt2"]
    return [
        ledger.identity("target tokens seen, T5 − decoder-only", difference, tolerance=0, unit="tokens", source=source),
        ledger.measurement("target tokens seen", tokens["t5"] / 1e6, unit="million", source=source),
        ledger.measurement("training pairs", records["t5"]["train_pairs"], unit="pairs", source=source),
        *losses,
    ]


def examples(found: dict[str, dict], pairs: Sequence[SentencePair], decoder: Decoder) -> list[dict[str, str]]:
    """Return the first pairs and their translations by both models."""
    return [
        {"source": pair.source, "reference": pair.target} | {name: found[name][decoder].texts[i] for name in found}
        for i, pair in enumerate(pairs[:EXAMPLES])
    ]


def too_short(texts: Sequence[str], pairs: Sequence[SentencePair]) -> bool:
    """Return True if BLEU is 0 because no translation has four tokens, although some tokens match."""
    return bleu.summed(bleu.count(texts, [pair.target for pair in pairs])).too_short


def claim(
    config: Config,
    labels: dict[str, str],
    lead: dict[str, Any],
    scores: dict[str, dict],
    sentences: int,
    *,
    ours: bool,
    short: bool = False,
) -> str:
    """Return both scores and their difference, with its interval if there are enough sentences.

    The scores are BLEU, or chrF if the translations of both models are too `short` for BLEU.
    """
    measure = "chrF" if short else "BLEU"
    score_of = {kind: scores[kind][measure.lower()]["estimate"] for kind in NAMES}
    difference = lead[measure.lower()]
    certain = (
        f"95% interval {difference['low']:.1f} to {difference['high']:.1f}"
        if "low" in difference
        else f"{sentences} sentences are too few for an interval"
    )
    training = " They are one training run each, on the same batches, tuned for neither." if ours else ""
    why = " BLEU is 0 for both because no translation has four tokens." if short else ""
    return (
        f"On {sentences} held-out sentences {labels['gpt2']} has {score_of['gpt2']:.1f} {measure} with beam "
        f"{config.beams_of_penalties} and {labels['t5']} {score_of['t5']:.1f}: a paired difference of "
        f"{difference['estimate']:.1f} ({certain}).{why}{training}"
    )


def card(kind: str, name: str, size: int, record: dict[str, Any], data: dict[str, Any]) -> str:
    """Return the model card of one of the two models, from the record of its training and its scores."""
    config, last = record["config"], record["log"][-1]
    shape = f"width {config['width']}, {config['heads']} heads)"
    described, form = {
        "t5": (
            f"A T5 of {size:,} parameters ({config['layers']} encoder layers, {config['layers']} in the decoder, "
            f"{shape}",
            "The encoder reads the English verse, the decoder writes the Spanish one.",
        ),
        "gpt2": (
            f"A GPT-2 of {size:,} parameters ({2 * config['layers']} layers, {shape}",
            "It reads the English verse and a line break as its prompt, and writes the Spanish one behind them; in "
            "training the loss was that of the Spanish verse alone.",
        ),
    }[kind]
    rows = sorted((row["beams"], row["length_penalty"], row) for row in data["table"] if row["kind"] == kind)
    table = embedded.table_rows(
        (beams, f"{penalty:g}", _interval(row["bleu"]), _interval(row["chrf"]), f"{row['length_ratio']:.2f}")
        for beams, penalty, row in rows
    )
    return embedded.card(
        "verses",
        name=name,
        kind=described,
        form=form,
        config=config,
        record=record,
        last=last,
        million_tokens=last["tokens"] / 1e6,
        data=data,
        table=table,
        examples=embedded.table_rows((each["source"], each["reference"], each[kind]) for each in data["examples"]),
    )


def _interval(interval: dict[str, float]) -> str:
    ends = f" ({interval['low']:.2f} to {interval['high']:.2f})" if "low" in interval else ""
    return f"{interval['estimate']:.2f}{ends}"

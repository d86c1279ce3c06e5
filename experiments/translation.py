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
from pathlib import Path
from typing import Any

from experiments import command, ledger
from experiments.parts import embedded, verses_card
from experiments.parts import translation_scores as scores
from experiments.parts import translation_training as training
from jaxrl_llm import models
from jaxrl_llm.data import parallel
from jaxrl_llm.data.parallel import SentencePair
from jaxrl_llm.translation import Form

NAMES = {"t5": "tiny-t5-verses", "gpt2": "tiny-gpt2-verses"}  # of the two models in the package


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: with the pairs it decides every number."""

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
PRESETS = {"quick": Config(), "full": FULL}


def run(config: Config) -> dict[str, Any]:
    """Train if asked to; translate the test pairs with every decoder; score and compare."""
    folders = folders_of(checked(config))
    if config.train:
        training.train(config, folders)
    if config.t5 is not None:
        folders = {"t5": config.t5, "gpt2": config.gpt}
    loaded = {name: models.load(folder) for name, folder in folders.items()}
    forms = {
        "t5": Form.of(loaded["t5"], prefix=config.t5_prefix),
        "gpt2": Form.of(loaded["gpt2"], prefix=config.gpt_prefix, suffix=config.gpt_suffix),
    }
    pairs = test_pairs(config, loaded["t5"])
    found = {name: scores.translations(config, loaded[name], forms[name], pairs) for name in loaded}
    labels = {name: scores.label(name, folder, loaded[name]) for name, folder in folders.items()}
    records = {} if config.t5 is not None else training.records(folders)
    result = scores.report(config, labels, loaded, found, pairs, records)
    if config.train and config.source is None:
        for name, folder in folders.items():
            card = verses_card.render(name, folder.name, loaded[name].model.num_params(), records[name], result)
            (folder / "README.md").write_text(card, encoding="utf-8")
    return result


def folders_of(config: Config) -> dict[str, Path]:
    """Return where the two models are, or are written to: those of the verses, or of your files."""
    if config.source is not None:
        return {name: config.work_dir / NAMES[name].removesuffix("-verses") for name in NAMES}
    return {name: embedded.folder(config, NAMES[name]) for name in NAMES}


def test_pairs(config: Config, loaded: models.Loaded) -> list[SentencePair]:
    """Return the first held-out pairs that are short enough; of a user's test files all, up to `sentences`."""
    if config.t5 is not None:
        return parallel.read_pairs(config.source, config.target)[: config.sentences]
    pairs = training.pairs_of(config).test
    short = training.short_pairs(loaded.tokenizer.backend_tokenizer, pairs, config.test_limit)
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


def named(name: str, config: Config) -> str:
    """Name the results of other models after the T5, and those of models trained on other text after its file."""
    own = config.t5 or (config.source and config.source.stem)
    return name if own is None else ledger.result_name(name, Path(own).name)


if __name__ == "__main__":
    command.main("translation", run, PRESETS, named=named)

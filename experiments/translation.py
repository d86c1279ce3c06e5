r"""Translation: an encoder-decoder against a decoder-only model, greedily and by beam search, in BLEU and chrF.

python -m experiments.translation --preset quick   # translate held-out verses with the two embedded models
python -m experiments.translation --preset full    # train both first: half an hour on 2 cores; resumes by itself
python -m experiments.translation --preset full --source train.en --target train.de --work-dir runs/mine
python -m experiments.translation --t5 t5-small --gpt mGPT --source test.en --target test.de \
    --t5-prefix "translate English to German: " --gpt-prefix "English: " --gpt-suffix $'\nGerman:'

A small T5 and a small GPT-2 with about as many parameters are trained on the same pairs in the same batches, so that
both see the same target tokens. The GPT-2 reads source, separator and target as one sequence, with the loss on the
target alone. Without files of one's own the pairs are English and Spanish verses, held out by chapter.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm import runtime

runtime.set_up()

import tyro  # noqa: E402

from experiments import ledger  # noqa: E402
from experiments.parts import translation_scores as scores  # noqa: E402
from experiments.parts import translation_training as training  # noqa: E402
from experiments.parts import verses_card  # noqa: E402
from jaxrl_llm import models  # noqa: E402
from jaxrl_llm.data import parallel  # noqa: E402
from jaxrl_llm.data.parallel import SentencePair  # noqa: E402
from jaxrl_llm.translation import Form  # noqa: E402

EMBEDDED = Path(models.__file__).parent / "embedded"
NAMES = {"t5": "tiny-t5-verses", "gpt2": "tiny-gpt2-verses"}  # of the two models in the package


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: with the pairs it decides every number."""

    train: bool = False
    t5: str | None = None  # folders or names of other models, with files of pairs to translate
    gpt: str | None = None
    source: Path | None = None
    target: Path | None = None
    t5_prefix: str | None = None
    gpt_prefix: str | None = None
    gpt_suffix: str | None = None
    work_dir: Path = Path("runs/translation")
    seed: int = 0
    sentences: int = 100  # that are translated
    sentences_at_once: int = 25
    held_out: int = 400  # lines of the user's files, for validation and for testing each
    limit: int = 32  # tokens of the longest sentence, on either side
    test_limit: int = 24  # the same of those that are translated
    beams: tuple[int, ...] = (1, 2, 4, 8, 16)
    penalties: tuple[float, ...] = (0.0, 1.0, 2.0)
    beams_of_penalties: int = 2
    length_penalty: float = 1.0
    new_tokens: int = 32
    resamples: int = 1000
    vocab_size: int = 4096
    width: int = 160
    layers: int = 2  # of encoder and decoder each; the decoder-only model has twice as many
    heads: int = 4
    batch_size: int = 64
    steps: int = 600
    warmup_steps: int = 50
    decay_steps: int = 300
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    eval_every: int = 100


FULL = Config(
    train=True,
    sentences=256,
    sentences_at_once=32,
    test_limit=31,  # 32 with the separator, which decoders pad less
    penalties=(0.0, 0.5, 1.0, 1.5, 2.0),
    beams_of_penalties=4,
    new_tokens=40,
)
PRESETS = {"quick": Config(), "full": FULL}


def run(config: Config) -> dict[str, Any]:
    """Train if asked to; translate the test pairs with every decoder; score and compare."""
    folders = {name: EMBEDDED / NAMES[name] for name in NAMES}
    if config.source is not None:
        folders = {name: config.work_dir / NAMES[name].removesuffix("-verses") for name in NAMES}
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


def test_pairs(config: Config, loaded: models.Loaded) -> list[SentencePair]:
    """The first held-out pairs that are short enough; of a user's test files all, in their order, up to `sentences`."""
    if config.t5 is not None:
        return parallel.read_pairs(config.source, config.target)[: config.sentences]
    pairs = training.pairs_of(config).test
    short = training.short_pairs(loaded.tokenizer.backend_tokenizer, pairs, config.test_limit)
    if not short:
        raise ValueError(f"no held-out pair has at most {config.test_limit} tokens on either side.")
    return short[: config.sentences]


def checked(config: Config) -> Config:
    """The configuration, if its parts belong together.

    Raises:
        ValueError: if only one of two models or files is given, models are without files, or files without a use.
    """
    for one, other in (("t5", "gpt"), ("source", "target")):
        if (getattr(config, one) is None) != (getattr(config, other) is None):
            raise ValueError(f"--{one} and --{other} belong together: give both.")
    if config.t5 is not None and (config.source is None or config.train):
        raise ValueError("--t5 and --gpt need --source and --target, and are not trained: leave --preset full out.")
    if config.t5 is None and config.source is not None and not config.train:
        raise ValueError("--source and --target are for --preset full, which trains on them, or for --t5 and --gpt.")
    return config


def main(
    preset: Literal["quick", "full"] = "quick",
    t5: str | None = None,
    gpt: str | None = None,
    source: Path | None = None,
    target: Path | None = None,
    t5_prefix: str | None = None,
    gpt_prefix: str | None = None,
    gpt_suffix: str | None = None,
    sentences: int | None = None,
    work_dir: Path = PRESETS["quick"].work_dir,
) -> None:
    """Write `results/translation.json`; with files or models of one's own, `results/translation.<name>.json`.

    Args:
        preset: quick translates with the models of the package; full trains two first.
        t5: a T5 to translate with: anything that `models.load` takes.
        gpt: a decoder-only model to hold against it.
        source: sentences, one a line, or both sides as .tsv or .jsonl.
        target: their translations, one a line.
        t5_prefix: before each sentence, as "translate English to German: ".
        gpt_prefix: the same for the decoder-only model.
        gpt_suffix: behind each sentence, after which the decoder-only model is to write the translation.
        sentences: how many are translated.
        work_dir: where a training leaves its checkpoints.
    """
    config = dataclasses.replace(
        PRESETS[preset],
        **{"t5": t5, "gpt": gpt, "source": source, "target": target, "work_dir": work_dir},
        **{"t5_prefix": t5_prefix, "gpt_prefix": gpt_prefix, "gpt_suffix": gpt_suffix},
        **({} if sentences is None else {"sentences": sentences}),
    )
    own = t5 or (source and source.stem)
    variant = "" if own is None else "." + re.sub(r"[^\w-]+", "-", Path(own).name).strip("-")
    ledger.run_and_write(f"translation{variant}", run, checked(config), preset)


if __name__ == "__main__":
    tyro.cli(main)

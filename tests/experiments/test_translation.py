"""The translation experiment on tiny models and files: training, evaluation, models of one's own, and the results."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import ledger, translation
from experiments.embedded import EMBEDDED
from figures import translation as figure
from jaxrl_llm import models
from jaxrl_llm.data.parallel import SentencePair
from jaxrl_llm.translation import Form, translate
from tests.experiments import entry

TEXT = "the cat sat on a mat and saw its own red hat by far not so big as that"
SMALL = {
    "vocab_size": 290,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "batch_size": 8,
    "limit": 11,
    "test_limit": 11,
    "held_out": 6,
}
FEW = {"sentences": 5, "beams": (1, 2), "penalties": (0.0, 1.0), "beams_of_penalties": 2, "new_tokens": 6}
SHORT = {"steps": 4, "warmup_steps": 1, "decay_steps": 2, "eval_every": 2, "resamples": 20}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Sentences, and as their translation the same backwards."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = [" ".join(rng.choice(TEXT.split(), rng.integers(1, 4))) for _ in range(80)]
    (folder / "all.en").write_text("\n".join(lines) + "\n")
    (folder / "all.xx").write_text("\n".join(line[::-1] for line in lines) + "\n")
    return folder / "all.en", folder / "all.xx"


@pytest.fixture(scope="module")
def config(files, tmp_path_factory):
    """Of a whole run."""
    own = {"source": files[0], "target": files[1], "work_dir": tmp_path_factory.mktemp("run")}
    return translation.Config(train=True, **own, **SMALL, **FEW, **SHORT)


@pytest.fixture(scope="module")
def trained(config):
    """The configuration and the result of a whole run."""
    return config, translation.run(config)


def number(result, name):
    (found,) = [each for each in result["numbers"] if each["name"] == name]
    return found


@pytest.mark.slow
def test_both_models_are_trained_on_the_same_target_tokens(trained):
    config, result = trained
    assert number(result, "target tokens seen, T5 − decoder-only")["value"] == 0
    logs = result["data"]["logs"]
    assert [[row["tokens"] for row in logs[name]] for name in logs] == [[row["tokens"] for row in logs["t5"]]] * 2
    records = translation.training_records({name: config.work_dir / f"tiny-{name}" for name in ("t5", "gpt2")})
    assert records["t5"]["log"][-1]["step"] == 4


@pytest.mark.slow
def test_the_table_has_every_model_and_decoder(trained):
    _, result = trained
    rows = result["data"]["table"]
    assert {(row["kind"], row["beams"], row["length_penalty"]) for row in rows} == {
        (kind, *decoder) for kind in ("t5", "gpt2") for decoder in ((1, 1.0), (2, 1.0), (2, 0.0))
    }
    for row in rows:
        assert set(row["bleu"]) == set(row["chrf"]) == {"estimate"}, "five sentences are too few for an interval"
        assert row["length_ratio"] >= 0 and row["seconds"] is None, "one batch is not timed: it compiles"
    json.dumps(result, allow_nan=False)
    assert "5 sentences are too few for an interval" in result["claim"]
    assert not any("confidence" in each or each["kind"] == "test" for each in result["numbers"])
    assert figure.draw({"data": ledger.rounded(result["data"])}).axes


def test_nothing_held_out_was_trained_on(config):
    parts = translation.pairs_of(config)
    assert len(parts.train) > 0 and len(parts.test) > 0
    for part in (parts.validation, parts.test):
        assert not {pair.source for pair in part} & {pair.source for pair in parts.train}
        assert not {pair.target for pair in part} & {pair.target for pair in parts.train}
    assert not set(parts.validation) & set(parts.test)


@pytest.mark.slow
def test_short_pairs_are_those_within_the_limit_on_both_sides(trained):
    config, _ = trained
    loaded = models.load(config.work_dir / "tiny-t5")
    pairs = translation.pairs_of(config).train
    kept = translation.short_pairs(loaded.tokenizer.backend_tokenizer, pairs, 6)
    lengths = {
        pair: max(len(loaded.tokenizer(side, add_special_tokens=False)["input_ids"]) for side in pair) for pair in pairs
    }
    assert kept == [pair for pair in pairs if lengths[pair] <= 6] and 0 < len(kept) < len(pairs)


@pytest.mark.slow
def test_models_and_files_of_ones_own_are_compared(trained, files):
    """Without training: prefixes and suffixes reach the models, and all the lines of the files are the test."""
    config, _ = trained
    folders = {name: str(config.work_dir / f"tiny-{name}") for name in ("t5", "gpt2")}
    own = translation.Config(
        t5=folders["t5"], gpt=folders["gpt2"], source=files[0], target=files[1], t5_prefix="mat ", gpt_suffix=" hat",
        **FEW, resamples=20,
    )  # fmt: skip
    result = translation.run(own)
    assert number(result, "sentence pairs")["value"] == 5 and result["data"]["logs"] == {}
    source = files[0].read_text().splitlines()[0]
    assert result["data"]["examples"][0]["source"] == source
    for name, form in (("t5", Form("mat ", "")), ("gpt2", Form("", " hat"))):
        loaded = models.load(folders[name])
        (expected,) = translate(loaded, [source], form=form, num_beams=2, length_penalty=1.0, max_new_tokens=6)
        assert result["data"]["examples"][0][name] == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"t5": "x"}, "--t5 and --gpt belong together"),
        ({"source": "x"}, "--source and --target belong together"),
        ({"t5": "x", "gpt": "y"}, "--t5 and --gpt need --source and --target"),
        ({"t5": "x", "gpt": "y", "source": "a", "target": "b", "train": True}, "are not trained"),
        ({"source": "a", "target": "b"}, "need --train"),
        ({"source": "a", "target": "b", "train": True, "replace_embedded": True}, "is for models of the verses"),
        ({"replace_embedded": True}, "must be given together with --train"),
    ],
)
def test_what_does_not_belong_together_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        translation.run(dataclasses.replace(translation.Config(), **given))


def test_a_training_leaves_the_models_of_the_package_alone():
    own = translation.folders_of(translation.Config(train=True, work_dir=Path("runs/mine")))
    assert own["t5"] == Path("runs/mine/tiny-t5-verses") and EMBEDDED not in own["gpt2"].parents
    replaced = translation.folders_of(translation.Config(train=True, replace_embedded=True))
    assert replaced == translation.folders_of(translation.Config())
    assert set(replaced.values()) == {EMBEDDED / "tiny-t5-verses", EMBEDDED / "tiny-gpt2-verses"}


def test_results_are_named_after_what_they_are_of():
    name = functools.partial(translation.named, "translation")
    assert name(translation.Config()) == name(translation.Config(train=True)) == "translation"
    assert name(translation.Config(t5="folder/t5-small", source=Path("a/test.en"))) == "translation.t5-small"
    assert name(translation.Config(source=Path("a/wmt 16.en"))) == "translation.wmt-16"


def test_too_few_lines_are_refused(files, tmp_path):
    config = translation.Config(train=True, source=files[0], target=files[1], work_dir=tmp_path)
    with pytest.raises(ValueError, match="are too few to hold out twice 400 of them"):
        translation.pairs_of(config)


def test_the_length_ratio_is_of_the_corpus():
    pairs = [translation.SentencePair("a", "one two three"), translation.SentencePair("b", "four")]
    decoder = translation.Decoder(1, 1.0)
    found = {"t5": {decoder: translation.Decoded(["one two", "four"], 0.5)}}
    (row,) = translation.table(translation.Config(resamples=10), {"t5": "x"}, found, pairs)
    assert row["length_ratio"] == 3 / 4 and row["seconds"] == 0.5


def test_translations_that_are_too_short_for_bleu_are_compared_by_chrf():
    pairs = [SentencePair("seven", "sieben"), SentencePair("nine", "neun")]
    assert translation.too_short(["sieben", "neun"], pairs) and not translation.too_short(["acht", "acht"], pairs)
    scores = {"bleu": {"estimate": 0.0}, "chrf": {"estimate": 100.0}}
    given = (translation.Config(), {"t5": "A", "gpt2": "B"}, scores, {"t5": scores, "gpt2": scores}, 2)
    said = translation.claim(*given, ours=False, short=True)
    assert "B has 100.0 chrF with beam 2 and A 100.0" in said and "no translation has four tokens" in said
    assert "B has 0.0 BLEU" in translation.claim(*given, ours=False)


def test_the_lead_is_tested_where_it_was_predicted():
    """The interval of models that are alike holds 0, and breaks the test; other models are measured."""
    config = translation.Config()
    for low, high, holds in ((7.0, 11.0, True), (-1.0, 2.0, False), (-11.0, -7.0, False)):
        lead = {"bleu": {"estimate": (low + high) / 2, "low": low, "high": high}}
        assert [ledger.holds(each) for each in translation.tested(config, lead)] == [holds]
    assert translation.tested(config, {"bleu": {"estimate": 9.0}}) == []


def test_the_committed_results_are_of_all_decoders():
    data = entry("translation")["data"]
    assert data["sentences"] == 256 and len(data["leads"]) == 8
    assert {row["beams"] for row in data["table"]} == {1, 2, 4, 8}

"""The table of translations: model x decoder, with BLEU, chrF, length ratio and seconds, and the claim."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments import ledger
from jaxrl_llm import translation
from jaxrl_llm.analysis import bleu, score_intervals
from jaxrl_llm.analysis.bootstrap import Interval
from jaxrl_llm.data.parallel import SentencePair
from jaxrl_llm.models import Loaded
from jaxrl_llm.translation import Form

EXAMPLES = 6  # the first pairs, whatever comes out
ENOUGH = 25  # sentences, below which a bootstrap interval is too narrow to be shown
SEED = 0  # of the bootstrap
NAMES = {"t5": "T5", "gpt2": "decoder-only"}
MEASURES = {
    "BLEU": (score_intervals.bleu_interval, score_intervals.bleu_difference),
    "chrF": (score_intervals.chrf_interval, score_intervals.chrf_difference),
}


class Decoder(NamedTuple):
    """Beams (1 is greedy) and the exponent of the length by which their scores are divided."""

    beams: int
    penalty: float


class Decoded(NamedTuple):
    """A decoder's translations, and the seconds for all of them; None where there was only one batch."""

    texts: list[str]
    seconds: float | None


def decoders(config: Any) -> list[Decoder]:
    """Return every number of beams at one length penalty, and every length penalty at one number of beams."""
    wide = [Decoder(beams, config.length_penalty) for beams in config.beams]
    return list(dict.fromkeys([*wide, *(Decoder(config.beams_of_penalties, each) for each in config.penalties)]))


def label(name: str, folder: str | Path, loaded: Loaded) -> str:
    """Return the name of a model in tables and figures."""
    return f"{Path(folder).name} ({NAMES[name]}, {loaded.model.num_params() / 1e6:.2f}M)"


def translations(config: Any, loaded: Loaded, form: Form, pairs: Sequence[SentencePair]) -> dict[Decoder, Decoded]:
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


def table(config: Any, labels: dict[str, str], found: dict[str, dict], pairs: Sequence[SentencePair]) -> list[dict]:
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


def leads(config: Any, found: dict[str, dict], pairs: Sequence[SentencePair]) -> list[dict[str, Any]]:
    """Return, for each decoder, how much higher the decoder-only model scores than the T5, paired by sentence."""
    rows = []
    for decoder in decoders(config):
        models = [found[name][decoder].texts for name in ("gpt2", "t5")]
        found_leads = {measure.lower(): _difference(config, measure, *models, pairs) for measure in MEASURES}
        rows.append({"beams": decoder.beams, "length_penalty": decoder.penalty} | found_leads)
    return rows


def _difference(config: Any, measure: str, first: list[str], second: list[str], pairs: Sequence[SentencePair]) -> Any:
    references, (_, difference) = [pair.target for pair in pairs], MEASURES[measure]
    return _shown(difference(first, second, references, seed=SEED, resamples=config.resamples), pairs)


def _shown(interval: Interval, pairs: Sequence[SentencePair]) -> dict[str, float]:
    """Return an estimate, with its interval if there are enough sentences for one."""
    return interval._asdict() if len(pairs) >= ENOUGH else {"estimate": interval.estimate}


def report(
    config: Any,
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
    text = claim(config, labels, lead, scores, len(pairs), ours=bool(records))
    return {"claim": text, "numbers": numbers, "data": data}


def tested(config: Any, lead: dict[str, Any]) -> list[dict[str, Any]]:
    """Test that the decoder-only model scores higher on the verses, by an interval that is two-sided."""
    if "low" not in lead["bleu"]:
        return []
    name = f"BLEU, decoder-only − T5, beam {config.beams_of_penalties}, lower end of its interval"
    source = "paired bootstrap over the sentences, two-sided 95%"
    return [ledger.test(name, lead["bleu"]["low"], at_least=0.0, wrong=-1.0, unit="points of 100", source=source)]


def measured(config: Any, lead: dict[str, Any], scores: dict[str, dict]) -> list[dict[str, Any]]:
    """Return the scores of both models at one decoder, and their paired differences."""
    beam, numbers = f"beam {config.beams_of_penalties}", []
    for measure in MEASURES:
        for kind, name in NAMES.items():
            score = scores[kind][measure.lower()]
            numbers.append(_measured(f"{measure}, {name}, {beam}", score, "bootstrap over the sentences"))
        name, source = f"{measure}, decoder-only − T5, {beam}", "paired bootstrap over the sentences"
        numbers.append(_measured(name, lead[measure.lower()], source))
    return numbers


def gains(config: Any, found: dict[str, dict], pairs: Sequence[SentencePair]) -> list[dict[str, Any]]:
    """Return how much the beams add to greedy decoding."""
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
    confidence = (interval["low"], interval["high"]) if "low" in interval else None
    return ledger.measurement(name, interval["estimate"], unit="points of 100", source=source, confidence=confidence)


def seen(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how much both models were trained on, which is the same, and their losses."""
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


def claim(
    config: Any, labels: dict[str, str], lead: dict[str, Any], scores: dict[str, dict], sentences: int, *, ours: bool
) -> str:
    """Return both scores and their difference, with its interval if there are enough sentences."""
    bleu_of = {kind: scores[kind]["bleu"]["estimate"] for kind in NAMES}
    difference = lead["bleu"]
    certain = (
        f"95% interval {difference['low']:.1f} to {difference['high']:.1f}"
        if "low" in difference
        else f"{sentences} sentences are too few for an interval"
    )
    training = " They are one training run each, on the same batches, tuned for neither." if ours else ""
    return (
        f"On {sentences} held-out sentences {labels['gpt2']} has {bleu_of['gpt2']:.1f} BLEU with beam "
        f"{config.beams_of_penalties} and {labels['t5']} {bleu_of['t5']:.1f}: a paired difference of "
        f"{difference['estimate']:.1f} ({certain}).{training}"
    )

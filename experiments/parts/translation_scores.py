"""The table of translations: model x decoder, with BLEU, chrF, length ratio and seconds, and what is claimed of it."""

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
from jaxrl_llm.data.parallel import SentencePair
from jaxrl_llm.models import Loaded
from jaxrl_llm.translation import Form

EXAMPLES = 6  # the first pairs, whatever comes out


class Decoder(NamedTuple):
    """Beams (1 is greedy) and the exponent of the length by which their scores are divided."""

    beams: int
    penalty: float


class Decoded(NamedTuple):
    """A decoder's translations, and the seconds for all of them; None where there was only one batch."""

    texts: list[str]
    seconds: float | None


def decoders(config: Any) -> list[Decoder]:
    """Every number of beams at one length penalty, and every length penalty at one number of beams."""
    wide = [Decoder(beams, config.length_penalty) for beams in config.beams]
    return list(dict.fromkeys([*wide, *(Decoder(config.beams_of_penalties, each) for each in config.penalties)]))


def label(name: str, folder: str | Path, loaded: Loaded) -> str:
    """How a model is called in tables and figures."""
    kind = {"t5": "T5", "gpt2": "decoder-only"}[name]
    return f"{Path(folder).name} ({kind}, {loaded.model.num_params() / 1e6:.2f}M)"


def translations(config: Any, loaded: Loaded, form: Form, pairs: Sequence[SentencePair]) -> dict[Decoder, Decoded]:
    """Each decoder's translations, timed from the second batch on: in the first the program compiles."""
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
    """One row for each model and decoder; intervals are 95% bootstrap intervals over the sentences."""
    references, rows = [pair.target for pair in pairs], []
    options = {"seed": config.seed, "resamples": config.resamples}
    for name, decoded in found.items():
        for decoder, (texts, seconds) in decoded.items():
            counts = bleu.count(texts, references)
            lengths = [sum(getattr(each, field) for each in counts) for field in ("length", "reference_length")]
            rows.append(
                {"model": labels[name], "kind": name, "beams": decoder.beams, "length_penalty": decoder.penalty}
                | {"bleu": score_intervals.bleu_interval(texts, references, **options)._asdict()}
                | {"chrf": score_intervals.chrf_interval(texts, references, **options)._asdict()}
                | {"length_ratio": lengths[0] / lengths[1], "seconds": seconds and round(seconds, 2)}
            )
    return rows


def report(
    config: Any,
    labels: dict[str, str],
    loaded: dict[str, Loaded],
    found: dict[str, dict[Decoder, Decoded]],
    pairs: Sequence[SentencePair],
    records: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The result in the ledger's form; `records` are those of the models' training, where it was ours."""
    rows = table(config, labels, found, pairs)
    greedy, beam = Decoder(1, config.length_penalty), Decoder(config.beams_of_penalties, config.length_penalty)
    numbers = [*differences(config, found, pairs, greedy, beam), *scores_of(rows, (greedy, beam))]
    sizes = [each.model.num_params() for each in loaded.values()]
    numbers.append(ledger.number("sentence pairs", len(pairs), unit="pairs", source="the test part or the files"))
    similar = {"interval": (0.9, 1.1)} if records else {}
    ratio = sizes[0] / sizes[1]
    shapes = "the models' shapes"
    numbers.append(ledger.number("parameters, T5 / decoder-only", ratio, unit="ratio", source=shapes, **similar))
    if records:
        numbers += seen(records)
    data = {
        "labels": labels,
        "beams_of_penalties": config.beams_of_penalties,
        "length_penalty": config.length_penalty,
        "sentences": len(pairs),
        "limit": config.test_limit,
        "table": rows,
        "examples": examples(found, pairs, beam),
        "logs": {name: record["log"] for name, record in records.items()},
    }
    return {
        "claim": claim(config, labels, numbers, ours=bool(records)),
        "numbers": numbers,
        "data": ledger.rounded(data),
    }


def differences(
    config: Any, found: dict[str, dict], pairs: Sequence[SentencePair], greedy: Decoder, beam: Decoder
) -> list[dict[str, Any]]:
    """Paired differences: of the two models with the same decoder, and of beams and greedy decoding of the same one."""
    references = [pair.target for pair in pairs]
    t5, gpt2 = found["t5"], found["gpt2"]
    compared = {
        "T5 − decoder-only, greedy": (t5[greedy], gpt2[greedy]),
        f"T5 − decoder-only, beam {beam.beams}": (t5[beam], gpt2[beam]),
        f"T5, beam {beam.beams} − greedy": (t5[beam], t5[greedy]),
        f"decoder-only, beam {beam.beams} − greedy": (gpt2[beam], gpt2[greedy]),
    }
    measures = {"BLEU": score_intervals.bleu_difference, "chrF": score_intervals.chrf_difference}
    numbers = []
    for name, (one, other) in compared.items():
        for measure, difference in measures.items():
            value = difference(one.texts, other.texts, references, seed=config.seed, resamples=config.resamples)
            numbers.append(_measured(f"{measure}, {name}", value._asdict(), "paired bootstrap over the sentences"))
    return numbers


def scores_of(rows: list[dict], decoders: Sequence[Decoder]) -> list[dict[str, Any]]:
    """The scores of both models with some of the decoders."""
    numbers = []
    for row in rows:
        if Decoder(row["beams"], row["length_penalty"]) in decoders:
            how = "greedy" if row["beams"] == 1 else f"beam {row['beams']}"
            name = {"t5": "T5", "gpt2": "decoder-only"}[row["kind"]]
            for measure, field in (("BLEU", "bleu"), ("chrF", "chrf")):
                numbers.append(_measured(f"{measure}, {name}, {how}", row[field], "bootstrap over the sentences"))
    return numbers


def seen(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """How much both models were trained on: the same."""
    tokens = {name: record["log"][-1]["tokens"] for name, record in records.items()}
    losses = {name: record["log"][-1]["held_out_loss"] for name, record in records.items()}
    difference = ledger.number(
        "target tokens seen, T5 − decoder-only",
        tokens["t5"] - tokens["gpt2"],
        expected=0,
        tolerance=0,
        unit="tokens",
        source="training.json",
    )
    return [
        difference,
        ledger.number("target tokens seen", tokens["t5"] / 1e6, unit="million", source="training.json"),
        ledger.number("training pairs", records["t5"]["train_pairs"], unit="pairs", source="training.json"),
        *(
            ledger.number(f"validation loss, {name}", losses[key], unit="nats per token", source="training.json")
            for key, name in (("t5", "T5"), ("gpt2", "decoder-only"))
        ),
    ]


def examples(found: dict[str, dict], pairs: Sequence[SentencePair], decoder: Decoder) -> list[dict[str, str]]:
    """The first pairs and what both models make of them."""
    return [
        {"source": pair.source, "reference": pair.target} | {name: found[name][decoder].texts[i] for name in found}
        for i, pair in enumerate(pairs[:EXAMPLES])
    ]


def claim(config: Any, labels: dict[str, str], numbers: list[dict[str, Any]], *, ours: bool) -> str:
    """What was measured, in two sentences."""
    found = {entry["name"]: entry for entry in numbers}
    beam = f"beam {config.beams_of_penalties}"
    t5, gpt2 = (found[f"BLEU, {name}, {beam}"]["value"] for name in ("T5", "decoder-only"))
    difference = found[f"BLEU, T5 − decoder-only, {beam}"]
    low, high = difference["interval"]
    verdict = "more than the choice of sentences explains" if low > 0 or high < 0 else "which may be chance"
    gains = [found[f"BLEU, {name}, {beam} − greedy"] for name in ("T5", "decoder-only")]
    shown = [f"{each['value']:+.1f} ({each['interval'][0]:.1f} to {each['interval'][1]:.1f})" for each in gains]
    training = ", both trained here on the same batches with the same settings, tuned for neither" if ours else ""
    return (
        f"On {found['sentence pairs']['value']} held-out pairs {labels['t5']} has {t5:.1f} BLEU with {beam} and "
        f"{labels['gpt2']} {gpt2:.1f}{training}: a difference of {difference['value']:.1f} ({low:.1f} to {high:.1f}), "
        f"{verdict}. Against greedy decoding the beam gives {shown[0]} and {shown[1]} BLEU."
    )


def _measured(name: str, interval: dict[str, float], source: str) -> dict[str, Any]:
    """A number with its 95% interval; the estimate itself may lie outside of it, in tiny samples."""
    low, high = min(interval["low"], interval["estimate"]), max(interval["high"], interval["estimate"])
    return ledger.number(name, interval["estimate"], interval=(low, high), unit="points of 100", source=source)

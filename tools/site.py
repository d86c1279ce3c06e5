"""Hooks of the documentation site (`make docs`): pages made from the README, the results and the code.

Pages link to files of the repository as they do on a code host. Here those files become part of the site, and a link to
a file that is not there ends the build.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import latex2mathml.converter
import nbconvert
import nbformat
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import catalogue  # noqa: E402
from figures import __main__ as gallery  # noqa: E402
from figures import _page, _results  # noqa: E402
from tools import reference  # noqa: E402

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = {  # that pages link to
    "results": "results/index.md",
    "figures/gallery": "results/index.md",
    "docs/trainers": "training.md",
    "docs/notebooks": "notebooks/theory.md",
}
REFERENCE = {  # of the public modules, by subject
    "Python interface": ["interface", "chat", "train", "evaluation", "rewards", "decoding_options"],
    "Functional decoding": [
        "decoding.generate", "decoding.many", "decoding.beam", "decoding.stochastic_beam", "decoding.contrastive",
        "decoding.exact_search", "decoding.speculative", "decoding.tree", "decoding.reranking", "decoding.constraints",
        "decoding.transforms",
    ],
    "Objectives": [
        "objectives.objective", "objectives.kl", "objectives.policy_gradient", "objectives.advantages",
        "objectives.aggregate", "objectives.reward_model", "objectives.preference", "objectives.rlhf",
        "objectives.logprobs",
    ],
    "The exact model": ["tabular", "oracle", "scoring", "language_model"],
    "Training": [
        "training.config", "training.steps", "training.loop", "training.preference", "training.policy",
        "training.rollout", "training.reward_fns", "training.distillation", "training.packing", "mesh",
    ],
    "Models": ["models.loading", "models.gpt2", "models.transformer", "models.families", "models.t5", "models.lora"],
    "Analyses": [
        "analysis.attention", "analysis.bleu", "analysis.chrf", "analysis.bootstrap", "analysis.diversity",
        "analysis.landscape.surface", "analysis.landscape.curvature", "analysis.sycophancy.effects",
    ],
}  # fmt: skip
CHILDREN = {"msup": 2, "msub": 2, "msubsup": 3, "mfrac": 2, "munder": 2, "mover": 2, "munderover": 3, "mroot": 2}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)]*)?(\))")


def on_config(config: Any) -> Any:
    """Append the results and the reference to the navigation."""
    results = [{"All claims": "results/index.md"}]
    results += [{subject: [_place(name) for name in names]} for subject, names in _by_subject().items()]
    modules = [{subject: [_reference(name) for name in names]} for subject, names in _present().items()]
    config.nav += [{"Results": results}, {"Reference": modules}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_relinked(text, "", page, files, config)))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        _add_notebook(notebook, files, config)
    files.append(File.generated(config, "site.css", abs_src_path=str(ROOT / "tools" / "site.css")))
    files.append(File.generated(config, "results/index.md", content=_claims()))
    for name in sorted(_results.result_names(_results.RESULTS)):
        picture = _results.GALLERY / f"{name}.png"
        files.append(File.generated(config, f"results/{name}.png", abs_src_path=str(picture)))
        read_on = " · ".join(f"[{what}](../{path})" for what, path in catalogue.links(name).items())
        read_on = _relinked(read_on, "results", _place(name), files, config)
        files.append(File.generated(config, _place(name), content=_result(name, read_on)))
    for names in _present().values():
        for name in names:
            files.append(File.generated(config, _reference(name), content=_reference_page(name)))
    return files


def _add_notebook(path: Path, files: Files, config: Any) -> None:
    """Add a notebook as a page, with its pictures beside it and a link to the file itself."""
    notebook = nbformat.read(path, 4)
    notebook.metadata.language_info = {"name": notebook.metadata.kernelspec.language}  # of the blocks of code
    text, found = nbconvert.MarkdownExporter().from_notebook_node(notebook)
    folder = f"notebooks/{path.stem}_files"
    for name, picture in found["outputs"].items():
        files.append(File.generated(config, f"{folder}/{name}", content=picture))
    text = _titled(text, f"{path.stem}_files")
    heading, rest = text.lstrip().split("\n", 1)
    link = f"[As a notebook]({path.name}), to download and run\n"
    files.append(File.generated(config, f"notebooks/{path.stem}.md", content=f"{heading}\n\n{link}{rest}"))


def _titled(text: str, folder: str) -> str:
    """Return a notebook's text with its pictures from a folder, each with the heading above it as alternative text."""
    heading = ""

    def titled(found: re.Match) -> str:
        nonlocal heading
        if found["heading"]:
            heading = re.sub(r"[\[\]`*$\\]", "", found["heading"])
        return f"![{heading}]({folder}/{found['picture']})" if found["picture"] else found[0]

    tokens = r"^```.*?^```$|^#+ (?P<heading>.*?)$|!\[[^\]]*\]\((?P<picture>output_[^)]+)\)"  # code has no headings
    return re.sub(tokens, titled, text, flags=re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Link a page of docs/ to pages and files of the site."""
    if page.file.generated_by:
        return markdown
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    return _relinked(markdown, folder, page.file.src_uri, files, config)


def on_page_content(html: str, **_: Any) -> str:
    """Turn TeX into MathML, which browsers show without a script."""

    def as_mathml(found: re.Match) -> str:
        tex = unescape(found[2]).strip()
        mathml = latex2mathml.converter.convert(tex[2:-2], display="block" if tex.startswith("\\[") else "inline")
        for element in ElementTree.fromstring(mathml).iter():
            name = element.tag.rpartition("}")[2]
            if len(element) != CHILDREN.get(name, len(element)):
                raise PluginError(
                    f"<{name}> has {len(element)} children in the MathML of {tex}: put its base in braces."
                )
        return mathml

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', as_mathml, html, flags=re.DOTALL)


def _relinked(markdown: str, folder: str, page: str, files: Files, config: Any) -> str:
    """Return a page with its links into the repository turned to the site, where the files are copied to."""

    def relinked(found: re.Match) -> str:
        before, target, anchor, after = found.groups()
        if re.match(r"[a-z]+:", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            raise PluginError(f"{folder or '.'}/{page} links to {target}, which is not in the repository.")
        to = FOLDERS.get(path) or PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if to is None:
            to = f"repository/{path}" + ".txt" * path.endswith(".md")  # as it is, not as a page
            if (ROOT / path).is_dir():
                raise PluginError(f"{page} links to the folder {path}: name it in tools/site.py.")
            if files.get_file_from_path(to) is None:
                files.append(File.generated(config, to, abs_src_path=str(ROOT / path)))
        return f"{before}{posixpath.relpath(to, posixpath.dirname(page) or '.')}{anchor or ''}{after}"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # not in blocks of code
    return "".join(part if part.startswith("```") else LINK.sub(relinked, part) for part in parts)


def _place(name: str) -> str:
    return f"results/{name}.md"


def _reference(name: str) -> str:
    return f"reference/{name}.md"


def _reference_page(name: str) -> str:
    """Return the page of a module: its own public names, not those that it imports."""
    module = importlib.import_module(f"jaxrl_llm.{name}")
    reference.prepare(module)
    own = [each for each, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    members = ", ".join(each for each in own if not each.startswith("_"))
    return f"# jaxrl_llm.{name}\n\n::: jaxrl_llm.{name}\n    options:\n      members: [{members}]\n"


def _present() -> dict[str, list[str]]:
    """Return the modules of `REFERENCE`."""
    missing = [
        name
        for names in REFERENCE.values()
        for name in names
        if not (ROOT / "jaxrl_llm" / f"{name.replace('.', '/')}.py").is_file()
    ]
    if missing:
        raise PluginError(f"tools/site.py names modules that are not there: {', '.join(missing)}.")
    return REFERENCE


def _by_subject() -> dict[str, list[str]]:
    return catalogue.by_subject(_results.result_names(_results.RESULTS))


def _entry(name: str) -> _page.Entry:
    return _page.Entry(name, gallery.title(name), _results.load(_results.RESULTS, name), ("png",))


def _claims() -> str:
    """Return the gallery: all claims by subject, with their verdicts and pictures."""
    lines = ["# Results", "", "Each experiment states one claim. [How to read them](../experiments.md).", ""]
    for subject, names in _by_subject().items():
        lines += [f"## {subject}", ""]
        for entry in map(_entry, names):
            lines += [f"### [{entry.title}]({entry.name}.md)", "", _finding(entry), "", _picture(entry), ""]
    return "\n".join(lines)


def _finding(entry: _page.Entry) -> str:
    claim = re.sub(r"([\\`*_<>\[\]])", r"\\\1", entry.results["claim"])  # it is plain text
    return f"**{claim}** {_page.SIGNS[_page.verdict(entry.results)]}."


def _picture(entry: _page.Entry) -> str:
    return f"[![{entry.title}]({entry.name}.png){{loading=lazy}}]({entry.name}.png)"


def _result(name: str, read_on: str) -> str:
    """Return the page of one claim: the finding, the picture, the numbers, where it came from, and links to read on."""
    entry = _entry(name)
    parts = [
        f"# {entry.title}",
        _finding(entry),
        _picture(entry),
        _page.table(entry.results["numbers"]),
        _page.origin(entry.results),
        read_on,
        f"`python -m experiments.{_results.figure_of(name)} --preset full` runs it.",
    ]
    return "\n\n".join(parts) + "\n"

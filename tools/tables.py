"""Tables of docs/ that are made from the code: options, preference losses, online methods.

    python -m tools.tables

writes the table of each line `<!-- options: DPOConfig beyond OfflineConfig -->`, `<!-- losses -->` or
`<!-- methods -->`, which readers do not see, below it.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

from jaxrl_llm.objectives import preference
from jaxrl_llm.options import field_docs, own_first
from jaxrl_llm.training import config
from jaxrl_llm.training.policy import METHODS, Method
from jaxrl_llm.training.preference import LOSSES

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKER = re.compile(
    r"^(<!-- (options|losses|methods)(?:: (\w+)(?: beyond (\w+))?)? -->)$(?:\n\n\|.*(?:\n\|.*)*)?", re.MULTILINE
)


def filled(page: str) -> str:
    """Return a page with the tables of its markers, in the place of those that it has."""
    made = {"options": options, "losses": losses, "methods": methods}
    return MARKER.sub(lambda found: f"{found[1]}\n\n{made[found[2]](*filter(None, found.groups()[2:]))}", page)


def options(name: str, beyond: str | None = None) -> str:
    """Return the options of a configuration that another does not have, or has with another default or meaning."""
    cls, base = getattr(config, name), beyond and getattr(config, beyond)
    known = (
        {}
        if base is None
        else {field.name: (_default(field), field_docs(base)[field.name]) for field in own_first(base)}
    )
    rows = [
        (f"`{field.name}`", _default(field), field_docs(cls)[field.name], f"`{spelling(cls, field)}`")
        for field in own_first(cls)
        if known.get(field.name) != (_default(field), field_docs(cls)[field.name])
    ]
    return _table(("option", "default", "meaning", "command line"), rows)


def spelling(cls: type, field: dataclasses.Field) -> str:
    """Return an option as it is written on the command line; a switch in the form that changes the default."""
    hint = get_type_hints(cls, include_extras=True)[field.name]
    name = next((each.name for each in getattr(hint, "__metadata__", ()) if hasattr(each, "name")), field.name)
    return f"--{'no-' * (field.default is True)}{name.replace('_', '-')}"


def losses() -> str:
    """Return the preference losses: of one pair, their hyperparameters, and the value at policy = reference."""
    told = re.findall(r"^\| (\w+) \| (.+) \|(.*)\| (.+) \|$", preference.__doc__, flags=re.MULTILINE)
    rows = []
    for name, of_a_pair, at_first, lowest in told[1:]:
        taken = ", ".join(f"`{each}` {default}" for each, default in LOSSES[name].hyperparameters.items())
        rows.append((f"`{name}`", of_a_pair, taken, at_first.strip(), lowest))
    return _table(("loss", "of one pair", "hyperparameters", "at policy = reference", "minimum at"), rows)


def methods() -> str:
    """Return the presets of `METHODS` with their choices and the numbers that are not the defaults of `Method`."""
    choices = ("advantage", "surrogate", "mode", "epochs", "kl", "beta", "scale_rewards")
    rows = []
    for name, method in METHODS.items():
        others = [
            f"`{field.name}` {getattr(method, field.name)}"
            for field in dataclasses.fields(Method)
            if field.name not in choices and getattr(method, field.name) != field.default
        ]
        rows.append((f"`{name}`", *(str(getattr(method, each)) for each in choices), ", ".join(others)))
    titles = ("method", "advantage", "surrogate", "mean over", "updates per batch", "`kl`", "`beta`", "`scale_rewards`")
    return _table((*titles, "others"), rows)


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return f"`{field.default!r}`"


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; a bar within a cell is not the end of it."""
    lines = [titles, ("---",) * len(titles), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for path in DOCS.rglob("*.md"):
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

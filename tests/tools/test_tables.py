"""Tables of docs/ made from the code: each option, loss and method is in one, as it is written on the command line."""

import dataclasses
import re

import pytest
import tyro

from jaxrl_llm.cli import train
from jaxrl_llm.training import config
from jaxrl_llm.training.policy import METHODS
from jaxrl_llm.training.preference import NAMES
from tools import tables

SHARED = ["training.md"]
PAGES = {  # of each trainer, with those whose options it has too
    "Sft": ["sft.md"],
    "Reward": ["reward.md"],
    "Dpo": ["preference.md"],
    "Distill": ["distillation.md"],
    "Grpo": ["online.md"],
    "Ppo": ["ppo.md", "online.md"],
}


def rows_of(page):
    found = (tables.DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+) \| `(--[a-z-]+)` \|$", found, flags=re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_every_option_of_a_trainer_is_in_a_table_as_the_command_line_spells_it(name):
    command = getattr(train, name)
    cls = next(each for each in command.__mro__ if each.__module__ == config.__name__)
    rows = {
        row[0]: row
        for page in [*PAGES[name], *SHARED]
        for row in rows_of(page if page in SHARED else f"trainers/{page}")
    }
    own = {field.name for field in dataclasses.fields(cls)}
    assert own <= set(rows)
    with pytest.warns(DeprecationWarning):
        parser = tyro.extras.get_parser(command)
    taken = {spelling for action in parser._actions for spelling in action.option_strings}
    for field in dataclasses.fields(cls):
        assert rows[field.name][3] in taken
    for option, default, meaning, _ in rows_of(f"trainers/{PAGES[name][0]}"):
        field = cls.__dataclass_fields__[option]
        value = field.default_factory() if field.default is dataclasses.MISSING else field.default
        assert default == repr(value) and meaning


def test_a_switch_that_is_on_is_spelled_as_it_is_turned_off():
    assert [row[3] for row in rows_of("training.md") if row[0] in ("cache", "packing")] == ["--no-cache", "--packing"]


def test_all_losses_and_methods_have_a_row():
    assert set(re.findall(r"^\| `(\w+)`", tables.losses(), flags=re.MULTILINE)) == set(NAMES)
    assert re.findall(r"^\| `(\w+)`", tables.methods(), flags=re.MULTILINE) == list(METHODS)
    assert "| `simpo` | −log σ(β(w − l) − γ), no reference | `beta` 0.1, `gamma` 0.5 |" in tables.losses()


@pytest.mark.parametrize("page", sorted(path.relative_to(tables.DOCS) for path in tables.DOCS.rglob("*.md")), ids=str)
def test_the_tables_of_a_page_are_up_to_date(page):
    text = (tables.DOCS / page).read_text(encoding="utf-8")
    assert tables.filled(text) == text, "python -m tools.tables writes them"
    kinds = ("<!-- options", "<!-- losses", "<!-- methods")
    assert sum(map(text.count, kinds)) == len(tables.MARKER.findall(text)), "no marker is misspelt"


def test_a_table_is_written_below_its_marker_once():
    once = f"a\n\n<!-- methods -->\n\n{tables.methods()}\n\nb\n"
    assert tables.filled("a\n\n<!-- methods -->\n\nb\n") == once == tables.filled(once)

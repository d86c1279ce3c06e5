"""The floors of the house: imports go down only, and what needs no jax brings none."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrl_llm

PACKAGE = Path(jaxrl_llm.__file__).parent
ROOT = PACKAGE.parent

# From the ground up: a module imports of its own part, and of parts on floors below. Parts that share a floor know
# nothing of each other.
FLOORS = [
    {"numerics", "options", "files", "rewards", "mesh"},
    {"objectives", "products", "runtime", "text", "decoding_options"},
    {"language_model", "data"},
    {"tabular", "scoring"},
    {"oracle", "models"},
    {"decoding"},
    {"training", "translation"},
    {"analysis"},
    {"plots", "strategies"},
    {"interface"},
    {"train", "chat"},
    {"evaluation"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(FLOORS) for part in parts}
STRANGERS = {("decoding", "models"), ("decoding", "tabular"), ("decoding", "oracle"), ("plots", "analysis")}


def parts():
    """Every part of the package: its subpackages and its modules."""
    return {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}


@functools.cache
def imported(path, root=PACKAGE):
    """Dotted names of all that a file imports, inside functions too: of `from a import b`, both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(root.parent).with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def edges(part):
    """(file, part imported) of every import of one part of the package by another."""
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else sorted((PACKAGE / part).rglob("*.py"))
    found = set()
    for path in files:
        for name in imported(path):
            pieces = name.split(".")
            if pieces[0] == "jaxrl_llm" and len(pieces) > 1 and pieces[1] in parts() - {part}:
                found.add((str(path.relative_to(PACKAGE)), pieces[1]))
    return found


def test_every_part_has_its_floor():
    assert parts() - {"__init__"} == set(LEVEL)


def test_the_walk_sees_imports():
    """Or the tests below would see no violation either."""
    assert ("training/supervised.py", "objectives") in edges("training")
    assert ("cli/generate.py", "plots") in edges("cli"), "inside functions too"
    assert ("models/tokenizers.py", "runtime") in edges("models")


@pytest.mark.parametrize("part", sorted(LEVEL))
def test_imports_go_down_only(part):
    upward = [f"{file} imports {other}" for file, other in edges(part) if LEVEL[other] >= LEVEL[part]]
    assert not upward
    strangers = [f"{file} imports {other}" for file, other in edges(part) if (part, other) in STRANGERS]
    assert not strangers


def test_objectives_are_arrays_in_arrays_out():
    """They import jax, and from the package nothing but each other and the numerics."""
    allowed = {"jax", "jaxtyping", "jaxrl_llm", *sys.stdlib_module_names}
    for path in sorted((PACKAGE / "objectives").glob("*.py")):
        names = imported(path)
        assert {name.split(".")[0] for name in names} <= allowed, path.name
        ours = {name for name in names if name.startswith("jaxrl_llm.")}
        allowed_ours = ("jaxrl_llm.objectives", "jaxrl_llm.numerics", "jaxrl_llm.submodules")
        assert all(name.startswith(allowed_ours) for name in ours), path.name


def test_no_jax_is_needed():
    """Nor flax, nor transformers; in any file of these packages."""
    code = """
import importlib, json, pkgutil, sys
import jaxrl_llm
packages = [importlib.import_module(name) for name in ("figures", "jaxrl_llm.plots")]
below = [[f"{package.__name__}.{each.name}" for each in pkgutil.iter_modules(package.__path__)] for package in packages]
for name in sum(below, []):
    importlib.import_module(name)
heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "transformers", "torch"}
print(json.dumps([[len(each) for each in below], sorted(heavy & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    sizes, heavy = json.loads(done.stdout)
    assert heavy == [] and min(sizes) >= 3


def test_the_library_knows_neither_experiments_nor_figures():
    for path in sorted(PACKAGE.rglob("*.py")):
        assert not {"experiments", "figures", "tests", "tools"} & {name.split(".")[0] for name in imported(path)}, (
            path.name
        )


def test_figures_draw_from_results_alone():
    """No module of the library that computes."""
    for path in sorted((ROOT / "figures").glob("*.py")):
        ours = {name.split(".")[1] for name in imported(path, ROOT / "figures") if name.startswith("jaxrl_llm.")}
        assert ours <= {"plots", "runtime"}, path.name

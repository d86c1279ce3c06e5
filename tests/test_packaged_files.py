"""The files of the wheel: the code and two small models, nothing that only the experiments need."""

from pathlib import Path

import pytest
from setuptools import Distribution

import jaxrl_llm as jl
from jaxrl_llm.data import verses
from jaxrl_llm.models import loading

ROOT = Path(__file__).resolve().parents[1]
MODEL = ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json")


def test_the_wheel_has_the_code_its_words_and_two_models(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["setup.cfg"])
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    found = {str(Path(each).relative_to(build.build_lib)) for each in build.get_outputs(include_bytecode=False)}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxrl_llm").rglob("*.py")}
    models = {f"jaxrl_llm/models/embedded/{name}/{file}" for name in ("tiny-gpt2", "tiny-t5") for file in MODEL}
    assert found == code | models | {f"jaxrl_llm/analysis/sycophancy/{name}.json" for name in ("facts", "users")}


def test_what_the_wheel_lacks_is_said(monkeypatch, tmp_path):
    assert all(map(loading.is_embedded, loading.EMBEDDED)) and verses.FILE.is_file()
    monkeypatch.setattr(loading, "_folder", lambda name: tmp_path / name)
    monkeypatch.setattr(verses, "FILE", tmp_path / "verses.tsv.xz")
    with pytest.raises(FileNotFoundError, match="tiny-t5-verses is not in the installed package: load its folder jax"):
        jl.load("tiny-t5-verses")
    with pytest.raises(FileNotFoundError, match=r"verses\.tsv\.xz is not in the installed package: a clone of the rep"):
        verses.load()

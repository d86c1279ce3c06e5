"""The set-up of a program."""

import os
import sys

import pytest

from jaxrl_llm import runtime

PYTHON, SCRIPT = sys.executable, "/bin/jaxrl-llm"
TRAIN = ["train", "dpo"]
ASKED = {"given": "always [madvise] never", "libc": "glibc 2.36", "argv": [SCRIPT, *TRAIN]}
AS_IT_IS = {
    "a user's choice": {"environment": {"GLIBC_TUNABLES": ""}},
    "huge pages for all": {"given": "[always] madvise never"},
    "for none": {"given": "always madvise [never]"},
    "no Linux": {"given": None},
    "an old glibc": {"libc": "glibc 2.31"},
    "another library": {"libc": None},
    "another program": {"argv": ["/bin/study", *TRAIN]},
    "arguments that are not the process's": {"argv": [SCRIPT, "train", "sft"]},
}


@pytest.mark.parametrize("case", [None, *AS_IT_IS])
def test_the_command_starts_again_with_huge_pages_only_where_they_are_given(case, monkeypatch, tmp_path):
    """Once, by the command that started it."""
    options = {"environment": {}, **ASKED, **AS_IT_IS.get(case, {})}
    started = []
    if options["given"] is not None:
        (tmp_path / "enabled").write_text(options["given"] + "\n")

    def confstr(name):
        if options["libc"] is None:
            raise ValueError(name)
        return options["libc"]

    monkeypatch.setattr(runtime, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(os, "environ", dict(options["environment"]))
    monkeypatch.setattr(os, "confstr", confstr)
    monkeypatch.setattr(os, "execv", lambda *given: started.append(given))
    monkeypatch.setattr(sys, "argv", options["argv"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-X", "utf8", SCRIPT, *TRAIN])
    runtime.ask_for_huge_pages()
    runtime.ask_for_huge_pages()
    assert started == ([] if case else [(PYTHON, [PYTHON, "-X", "utf8", SCRIPT, *TRAIN])])

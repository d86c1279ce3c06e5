"""`jaxrl-llm translate`: sentences by a T5 or a decoder-only model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from jaxrl_llm.cli import devices


@dataclasses.dataclass(frozen=True)
class Translate:
    """Translate a sentence. Several come from a file or standard input, one a line, and are printed one a line."""

    text: tyro.conf.Positional[str | None] = None
    """The sentence; without it, and without --file, or as "-", lines are read from standard input."""
    file: Path | None = None
    """A file of sentences, one a line."""
    model: str = "tiny-t5"
    """A folder, tiny-t5 (English to German number names), in a clone of the repository tiny-t5-verses or
    tiny-gpt2-verses (to Spanish, badly), or a name on the Hugging Face hub."""
    num_beams: int = 1
    """Hypotheses of the search; 1 is greedy decoding."""
    length_penalty: float = 1.0
    """Beams are ranked by log p divided by their length to this power."""
    max_new_tokens: int = 64
    """The most tokens of a translation."""
    prefix: str | None = None
    """Text before each sentence, such as "translate English to German: "; by default that of config.json."""
    suffix: str | None = None
    """Text after each sentence; a line break for a decoder-only model, if config.json says nothing."""
    batch_size: int = 32
    """Sentences that are translated together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters."""
    mesh: str | None = None
    """Devices that share the work, as in `generate`."""

    def run(self) -> None:
        """Print the translations, one a line; an empty line stays empty."""
        lines = read_lines(self.text, self.file)
        if self.num_beams < 1:
            raise ValueError(f"--num-beams must be at least 1, but is {self.num_beams}.")
        if self.num_beams == 1 and self.length_penalty != 1:
            raise ValueError("--length-penalty ranks beams: it needs --num-beams of 2 or more.")
        mesh = devices.mesh_of(self.mesh)
        import jaxrl_llm as jl
        from jaxrl_llm import models

        names = ("num_beams", "length_penalty", "max_new_tokens", "batch_size", "prefix", "suffix")
        sentences = [line for line in lines if line.strip()]
        options = {name: getattr(self, name) for name in names}
        lm = jl.load(self.model, dtype=self.dtype, mesh=mesh)
        plain = not isinstance(lm.model, models.T5) and "translation" not in lm.config
        if plain and self.prefix is None and self.suffix is None:
            print(
                f"jaxrl-llm: {self.model} does not say that it translates: it continues each sentence after a line "
                "break. --prefix and --suffix ask it in other words.",
                file=sys.stderr,
            )
        found = iter(lm.translate(sentences, **options))
        for line in lines:
            print(next(found).replace("\n", " ") if line.strip() else "")


def read_lines(text: str | None, file: Path | None) -> list[str]:
    """Return one sentence, or the lines of a file or of standard input."""
    if text is not None and file is not None:
        raise ValueError("give either a text or --file, not both.")
    if text not in (None, "-"):
        lines, where = [text], "the text"
    elif file is not None:
        lines, where = split_lines(file.read_bytes().decode("utf-8")), str(file)
    elif text is None and sys.stdin.isatty():
        raise ValueError('give a text, a file with --file, or lines on standard input ("-").')
    else:
        lines, where = split_lines(sys.stdin.read()), "standard input"
    if not any(line.strip() for line in lines):
        raise ValueError(f"there is nothing to translate in {where}.")
    return lines


def split_lines(content: str) -> list[str]:
    """Split at line feeds, with or without a carriage return, and at nothing else; drop a byte order mark."""
    lines = content.removeprefix("\ufeff").removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]

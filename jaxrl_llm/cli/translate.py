"""`jaxrl-llm translate`: sentences by a T5 or a decoder-only model."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxrl_llm import files
from jaxrl_llm.cli import devices

ENOUGH = 25  # sentences, below which a bootstrap interval is too narrow to be shown


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
    allow_unknown: bool = False
    """Read words that the tokenizer does not know as its unknown token; by default their sentence is refused."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters."""
    mesh: str | None = None
    """Devices that share the work, as in `generate`."""
    references: tuple[Path, ...] = ()
    """Files of reference translations, one a line, from which BLEU and chrF are computed; they are printed on standard
    error, with 95% intervals over the sentences from 25 on."""
    against: Path | None = None
    """A file of another model's translations, one a line: print by how much this model scores higher, paired by
    sentence."""
    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    """BLEU's tokens, as in sacreBLEU: zh for Chinese, char for text without spaces, intl for other scripts."""

    def run(self) -> None:
        """Print the translations, one a line; an empty line stays empty. Print scores against references."""
        lines = read_lines(self.text, self.file)
        if not self.references and (self.against is not None or self.tokenize != "13a"):
            raise ValueError("--against and --tokenize are for scores: give --references.")
        references = [aligned(path, lines) for path in self.references]
        against = None if self.against is None else aligned(self.against, lines, may_be_empty=True)
        if self.num_beams < 1:
            raise ValueError(f"--num-beams must be at least 1, but is {self.num_beams}.")
        if self.num_beams == 1 and self.length_penalty != 1:
            raise ValueError("--length-penalty ranks beams: it needs --num-beams of 2 or more.")
        mesh = devices.mesh_of(self.mesh)
        import jaxrl_llm as jl
        from jaxrl_llm import models

        names = ("num_beams", "length_penalty", "max_new_tokens", "batch_size", "prefix", "suffix", "allow_unknown")
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
        translations = lm.translate(sentences, **options)
        found = iter(translations)
        for line in lines:
            print(next(found).replace("\n", " ") if line.strip() else "")
        if references:
            if blank := len(lines) - len(sentences):
                print(f"jaxrl-llm: {blank} of {len(lines)} lines blank in all files, not scored.", file=sys.stderr)
            print_scores(translations, list(zip(*references, strict=True)), against, tokenize=self.tokenize)


def print_scores(
    translations: list[str], references: list[tuple[str, ...]], against: list[str] | None, *, tokenize: str
) -> None:
    """Print BLEU and chrF, and the differences from other translations, with paired bootstrap intervals."""
    from jaxrl_llm.analysis import bleu, bootstrap

    sys.stdout.flush()
    intervals = len(translations) >= ENOUGH
    options = {"seed": 0, "resamples": 1000 if intervals else 1}

    def shown(found: Any, sign: str = "") -> str:
        ends = f" ({found.low:{sign}.1f} to {found.high:{sign}.1f})" if intervals else ""
        return f"{found.estimate:{sign}.1f}{ends}"

    of_bleu = bootstrap.bleu_interval(translations, references, tokenize=tokenize, **options)
    of_chrf = bootstrap.chrf_interval(translations, references, **options)
    sentences = "sentence" if len(translations) == 1 else "sentences"
    says = [f"BLEU {shown(of_bleu)}, chrF {shown(of_chrf)} of {len(translations)} {sentences}"]
    if against is not None:
        of_bleu = bootstrap.bleu_difference(translations, against, references, tokenize=tokenize, **options)
        of_chrf = bootstrap.chrf_difference(translations, against, references, **options)
        says.append(f"higher than --against by BLEU {shown(of_bleu, '+')}, chrF {shown(of_chrf, '+')}")
    systems = {"the translations": translations, "--against": against or []}
    counts = {name: bleu.count(texts, references[: len(texts)], tokenize=tokenize) for name, texts in systems.items()}
    if short := [name for name, each in counts.items() if bleu.summed(each).too_short]:
        says.append(
            f"BLEU of {' and of '.join(short)} is 0 because no sentence has 4 tokens, whatever matches: see chrF"
        )
    for line in says:
        print(f"jaxrl-llm: {line}.", file=sys.stderr)


def aligned(path: Path, lines: list[str], *, may_be_empty: bool = False) -> list[str]:
    """Return the lines of a file that belong to the lines that are not blank: line i of one to line i of the other.

    Raises:
        ValueError: if the file has another number of lines, or a line is blank on one side only. A translation of a
            sentence may be blank with `may_be_empty`.
    """
    found = split_lines(files.read_text(path))
    if len(found) != len(lines):
        raise ValueError(f"{path} must have a line for each of {len(lines)} lines to translate, but has {len(found)}.")
    for number, (line, sentence) in enumerate(zip(found, lines, strict=True), 1):
        if sentence.strip() and not line.strip() and not may_be_empty:
            raise ValueError(f"line {number} of {path} must be a translation, but is blank.")
        if line.strip() and not sentence.strip():
            raise ValueError(f"line {number} of {path} must be blank like the line to translate, but is {line!r}.")
    return [line for line, sentence in zip(found, lines, strict=True) if sentence.strip()]


def read_lines(text: str | None, file: Path | None) -> list[str]:
    """Return one sentence, or the lines of a file or of standard input."""
    if text is not None and file is not None:
        raise ValueError("give either a text or --file, not both.")
    if text not in (None, "-"):
        lines, where = [text], "the text"
    elif file is not None:
        lines, where = split_lines(files.read_text(file)), str(file)
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

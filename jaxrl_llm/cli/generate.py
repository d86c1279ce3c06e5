"""`jaxrl-llm generate`: continue prompts by any strategy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxrl_llm.cli.options import Sampling, Search, Strategy, check_known
from jaxrl_llm.cli.prompts import Batch, load_batch, read_prompts


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, or answer it with --chat. Several prompts come from a file or standard input, one a line."""

    prompt: tyro.conf.Positional[str | None] = None
    """The text to continue; without it, and without --prompts, lines are read from standard input."""
    prompts: Path | None = None
    """A file of prompts, one a line."""
    model: str = "tiny-gpt2"
    """A folder, a .gguf file, tiny-gpt2, smollm2-135m-instruct, or a name on the Hugging Face hub."""
    strategy: Strategy = "sample"
    """How the text is decoded."""
    greedy: bool = False
    """The same as --strategy greedy."""
    max_new_tokens: int = 64
    """The most tokens to add."""
    num_samples: int = 1
    """Continuations of each prompt; of beams, hypotheses that are printed."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not printed. For sample and greedy."""
    guidance_prompt: str | None = None
    """Move away from what would follow this prompt too. For sample and greedy."""
    guidance_scale: float = 1.5
    """How far; 1 is not at all."""
    chat: bool = False
    """Put the prompt into the model's chat template."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)
    search: Annotated[Search, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Search)

    def run(self) -> None:
        """Print each continuation: a single one as it comes, several when they are there."""
        strategy = self.chosen()
        streams = strategy in ("sample", "greedy")
        if not streams and (self.stop or self.guidance_prompt is not None):
            raise ValueError("--stop and --guidance-prompt are for --strategy sample and greedy.")
        if self.num_samples < 1:
            raise ValueError(f"--num-samples must be at least 1, but is {self.num_samples}.")
        beams = strategy.endswith("beam")
        if self.search.num_beams < 1:
            raise ValueError(f"--num-beams must be at least 1, but is {self.search.num_beams}.")
        if beams and self.num_samples > self.search.num_beams:
            raise ValueError(f"--num-samples is {self.num_samples}, but --num-beams only {self.search.num_beams}.")
        copies = 1 if beams else self.num_samples
        prompts = [prompt for prompt in read_prompts(self.prompt, self.prompts) for _ in range(copies)]
        batch = load_batch(self.model, prompts, dtype=self.dtype, chat=self.chat)
        if streams:
            self.print_stream(batch, prompts, greedy=strategy == "greedy")
        else:
            self.print_answers(batch, prompts, strategy)

    def chosen(self) -> str:
        """The strategy, checked against the other options."""
        if self.greedy and self.strategy not in ("sample", "greedy"):
            raise ValueError(f"--greedy and --strategy {self.strategy} are two strategies: give one.")
        strategy = "greedy" if self.greedy else self.strategy
        check_known(strategy, self.sampling)
        return strategy

    def print_stream(self, batch: Batch, prompts: list[str], *, greedy: bool) -> None:
        """Text as soon as it is known."""
        import jax

        from jaxrl_llm import text
        from jaxrl_llm.decoding import stop_strings, stream

        tokenizer, stop = batch.loaded.tokenizer, None
        if self.stop:
            stop = stop_strings(text.token_bytes(tokenizer, batch.loaded.model.vocab_size), self.stop)
        pieces = stream(
            batch.loaded.model,
            batch.loaded.params,
            batch.tokens,
            prompt_mask=batch.mask,
            max_new_tokens=self.max_new_tokens,
            transform=self.sampling.transform(batch),
            greedy=greedy,
            key=jax.random.key(self.sampling.seed),
            eos_id=batch.eos_ids,
            stop=stop,
            guidance=self.guidance(batch),
        )
        streams = [text.TextStream(tokenizer, () if self.chat else row) for row in batch.rows]
        heads = ["" if self.chat else prompt for prompt in prompts]
        if len(prompts) == 1 and not self.stop:
            for piece in pieces:
                print(heads.pop() if heads else "", end="")  # not before it is known that the prompt is accepted
                print(streams[0].push(piece.tokens[0][piece.mask[0]].tolist()), end="", flush=True)
            print(streams[0].finish())
            return
        texts = [""] * len(prompts)
        for piece in pieces:
            for i, row in enumerate(streams):
                texts[i] += row.push(piece.tokens[i][piece.mask[i]].tolist())
        for i, row in enumerate(streams):
            texts[i] = heads[i] + text.trim_at_stop(texts[i] + row.finish(), self.stop)
        if len(texts) == 1:
            print(texts[0])
            return
        for i, each in enumerate(texts):
            print(f"--- {i + 1}: {prompts[i]}" if self.chat else f"--- {i + 1}", each, sep="\n")

    def guidance(self, batch: Batch) -> Any:
        """The second prompt, for every row."""
        if self.guidance_prompt is None:
            return None
        from jaxrl_llm import text
        from jaxrl_llm.decoding import Guidance

        row = text.encode(batch.loaded.tokenizer, self.guidance_prompt, chat=self.chat)
        tokens, mask = text.left_pad([row] * len(batch.rows))
        return Guidance(tokens, self.guidance_scale, mask)

    def print_answers(self, batch: Batch, prompts: list[str], strategy: str) -> None:
        """All at the end, each with what there is to say about it."""
        from jaxrl_llm.cli.strategies import Task, answers

        found = answers(strategy, Task(batch, self.sampling, self.search, self.max_new_tokens))
        for i, (prompt, hypotheses) in enumerate(zip(prompts, found, strict=True)):
            for j, answer in enumerate(hypotheses[: self.num_samples]):
                if len(prompts) > 1 or self.num_samples > 1:
                    print(f"--- {i + 1}" + (f".{j + 1}" if strategy.endswith("beam") else "") + f": {answer.note}")
                print(answer_text(batch, i, prompt, answer.tokens, chat=self.chat))


def answer_text(batch: Batch, index: int, prompt: str, tokens: list[int], *, chat: bool) -> str:
    """The prompt, unless it was a chat, and the new text."""
    from jaxrl_llm import text

    row = text.TextStream(batch.loaded.tokenizer, () if chat else batch.rows[index])
    return ("" if chat else prompt) + row.push(tokens) + row.finish()

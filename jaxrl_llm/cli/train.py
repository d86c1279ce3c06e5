"""`jaxrl-llm train`: the trainers of `jaxrl_llm.train` on files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jaxrl_llm.training import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The files of every run."""

    data: Path
    """A file of JSON lines, JSON, CSV or Parquet."""
    out: Path
    """Folder of the run and, at its end, of the model."""
    model: str = "tiny-gpt2"
    """A folder, a built-in model, or a name on the Hugging Face hub."""


class Command:
    """Calls the trainer of the command's name. The configuration is checked there, so that an error is one line."""

    def __post_init__(self):
        pass

    def run(self) -> None:
        """Train, and write the model; several processes do it together."""
        from jaxrl_llm import mesh

        mesh.join()  # before anything else of jax
        from jaxrl_llm import train

        kind = next(each for each in type(self).__mro__ if each.__module__ == config.__name__)
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}
        trainer = getattr(train, type(self).__name__.lower())
        trainer(self.model, self.data, out=self.out, config=kind(**options))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(Command, config.SFTConfig, Files):
    """Fine-tune on completions: lines of prompt and completion, of messages, or of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Command, config.RewardConfig, Files):
    """Train a reward model on prompt, chosen and rejected, or on prompt, answers and ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(Command, config.DPOConfig, Files):
    """Optimise preferences: prompt, chosen and rejected (for kto: prompt, completion and label)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(Command, config.DistillConfig, Files):
    """Learn the next-token distributions of a teacher (GKD): lines of prompt and completion, or prompts alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo(Command, config.GRPOConfig, Files):
    """Optimise rewards of the model's own completions, each compared with the others of its prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ppo(Command, config.PPOConfig, Files):
    """Optimise rewards of the model's own completions against a critic, with clipped updates."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model from files. The output folder loads here and in transformers."""

    what: (
        Annotated[Sft, tyro.conf.subcommand("sft")]
        | Annotated[Reward, tyro.conf.subcommand("reward")]
        | Annotated[Dpo, tyro.conf.subcommand("dpo")]
        | Annotated[Distill, tyro.conf.subcommand("distill")]
        | Annotated[Grpo, tyro.conf.subcommand("grpo")]
        | Annotated[Ppo, tyro.conf.subcommand("ppo")]
    )

    def run(self) -> None:
        """Train."""
        self.what.run()

"""Unknown names: the option that another library calls so, or that is spelled alike, is named."""

import dataclasses
import inspect

import pytest

import jaxrl_llm as jl
from jaxrl_llm import train
from jaxrl_llm.cli import Generate
from jaxrl_llm.decoding_options import Sampling
from jaxrl_llm.interface import LM
from jaxrl_llm.options import ELSEWHERE, nearest
from jaxrl_llm.training.config import GRPOConfig, SFTConfig
from jaxrl_llm.training.preference import NAMES

FUNCTIONS = [LM.generate, train.sft, train.reward, train.dpo, train.distill, train.grpo, train.ppo]


@pytest.mark.parametrize(
    ("call", "given", "meant"),
    [
        (LM.generate, "num_return_sequences", "n"),
        (LM.generate, "do_sample", "greedy"),
        (LM.generate, "max_length", "max_new_tokens"),
        (LM.stream, "stop_strings", "stop"),
        (jl.load, "torch_dtype", "dtype"),
        (jl.load, "device_map", "mesh"),
        (train.sft, "lr", "learning_rate"),
        (train.dpo, "per_device_train_batch_size", "batch_size"),
        (train.dpo, "loss_type", "loss"),
        (train.dpo, "train_dataset", "data"),
        (train.grpo, "num_generations", "group_size"),
        (train.grpo, "max_completion_length", "max_new_tokens"),
        (train.grpo, "train_dataset", "prompts"),
        (train.ppo, "kl_coef", "beta"),
        (SFTConfig, "num_train_epochs", "num_epochs"),
        (GRPOConfig, "reward_funcs", "reward"),
        (train.reward, "center_rewards_coefficient", "centering"),
        (train.reward, "target_modules", "lora_targets"),
        (Sampling, "temprature", "temperature"),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_that_is_meant(call, given, meant):
    with pytest.raises(TypeError, match=rf"{call.__name__}\(\) got .* argument '{given}': did you mean '{meant}'\?"):
        call(**{given: 1})


def test_every_name_of_the_table_is_unknown_where_ours_is_known():
    known = [set(inspect.signature(each).parameters) for each in FUNCTIONS]
    known += [{field.name for field in dataclasses.fields(Generate)}, set(NAMES)]
    for ours, others in ELSEWHERE.items():
        for name in others.split():
            assert any(ours in names and name not in names for names in known), (ours, name)


def test_a_loss_of_another_library_is_refused_with_ours():
    with pytest.raises(ValueError, match="but is 'sigmoid': did you mean 'dpo'"):
        train.dpo("nowhere", [], loss="sigmoid")


def test_a_name_that_means_nothing_has_no_hint():
    assert nearest("colour", ["steps"]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate x --stop --greedy", "--stop must have at least one value, but has none."),
        ("train dpo --data a --out b --loss-kwargs", "--loss-kwargs must have at least one value, but has none."),
        ("train sft --data a --out b --lr 3", "there is no option --lr: did you mean --learning-rate?"),
        ("train ppo --data a --out b --lam=1 --reward a:b", "there is no option --lam: did you mean --lambda?"),
        (
            "generate hi --num-return-sequences 3",
            "there is no option --num-return-sequences: did you mean --num-samples?",
        ),
        ("tree hi --temperatur 3", "there is no option --temperatur: did you mean --temperature?"),
        ("tree hi --hue", "there is no option --hue."),
        (
            "tree hi there",
            "the command takes no further argument, but is given 'there': put a text of several words in quotes.",
        ),
        ("info there", "the command takes no further argument, but is given 'there'."),
    ],
)
def test_so_does_the_command_line(run, words, said):
    assert run(*words.split()) == (2, "", f"jaxrl-llm: {said}\n")


def test_help_names_what_is_given_by_place_and_shows_none_without_braces(run):
    status, out, _ = run("tree", "--help")
    assert status == 0 and "[TREE OPTIONS] PROMPT" in out and "--top-k None|INT" in out and "{None" not in out

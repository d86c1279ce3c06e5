"""Options, declared once as the fields of dataclasses: ranges, docs, and functions that take them by keyword."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

Function = TypeVar("Function", bound=Callable[..., Any])
LISTED = "Options: listed here."
ELSEWHERE = {  # our options and losses, with their names in TRL, PEFT, transformers and other libraries
    "attention": "attn_implementation use_flash_attention",
    "batch_size": "per_device_train_batch_size train_batch_size",
    "beta": "kl_coef init_kl_coef kl_coeff kl_penalty",
    "alpha": "penalty_alpha",
    "centering": "center_rewards_coefficient",
    "chat": "apply_chat_template",
    "checkpoint_blocks": "gradient_checkpointing",
    "clip_high": "epsilon_high cliprange",
    "clip_low": "epsilon",
    "clip_norm": "max_grad_norm grad_clip",
    "cut": "truncation truncation_mode truncation_side",
    "data": "train_dataset dataset",
    "discount": "gae_gamma",
    "draft_model": "assistant_model speculative_model",
    "dtype": "bf16 fp16 torch_dtype",
    "entropy_coefficient": "entropy_coeff entropy_coef ent_coef",
    "epochs": "num_iterations num_ppo_epochs",
    "epsilon": "epsilon_cutoff",
    "eta": "eta_cutoff",
    "eval_data": "eval_dataset",
    "grammar": "guided_grammar",
    "greedy": "do_sample",
    "group_size": "num_generations num_return_sequences",
    "guidance_prompt": "negative_prompt negative_prompt_ids",
    "heal": "token_healing",
    "importance_cap": "vllm_importance_sampling_cap tis_imp_ratio_cap",
    "importance_mode": "vllm_importance_sampling_mode",
    "keep": "save_total_limit",
    "json_schema": "guided_json response_format",
    "kl": "kl_loss use_kl_loss kl_in_reward use_kl_in_reward",
    "lambda_": "lam gae_lambda",
    "learning_rate": "lr",
    "lm": "model",
    "log_every": "logging_steps",
    "lora_dropout": "dropout",
    "lora_from": "adapter adapter_path",
    "lora_rank": "rank r lora_r peft_config use_peft",
    "lora_rslora": "use_rslora",
    "lora_targets": "target_modules lora_target_modules",
    "loss": "loss_type ld_alpha use_weighting",
    "loss_kwargs": "label_smoothing f_divergence_type f_alpha_divergence_coef simpo_gamma alpha_param",
    "mask_truncated": "mask_truncated_completions overlong_filtering",
    "max_length": "max_seq_length max_prompt_length",
    "max_new_tokens": "max_length max_tokens max_completion_length response_length",
    "mesh": "device_map tensor_parallel_size",
    "microbatches": "gradient_accumulation_steps",
    "min_new_tokens": "min_length min_tokens",
    "minibatches": "num_mini_batches",
    "mirostat": "mirostat_tau",
    "n": "num_return_sequences num_samples num_generations",
    "mixture": "jsd_beta",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "num_beams": "beam_width beam_size",
    "num_candidates": "best_of",
    "num_draft": "num_assistant_tokens num_speculative_tokens prompt_lookup_num_tokens",
    "num_groups": "num_beam_groups",
    "num_samples": "n num_return_sequences num_generations",
    "on_policy": "lmbda",
    "out": "output_dir",
    "overlong_buffer": "soft_punish_cache overlong_buffer_len",
    "prompts": "train_dataset dataset",
    "precompute_reference": "precompute_ref_log_probs precompute_ref_batch_size",
    "reference": "ref_model ref_model_init_kwargs",
    "resume": "resume_from_checkpoint",
    "reward": "reward_funcs reward_function",
    "save_every": "save_steps eval_steps",
    "scale_rewards": "norm_adv_by_std_in_grpo normalize_advantages",
    "seed": "random_seed random_state",
    "num_epochs": "num_train_epochs epochs",
    "optimizer": "optim",
    "optimizer_kwargs": "adam_beta1 adam_beta2 adam_epsilon betas momentum optim_args",
    "param_dtype": "torch_dtype model_dtype",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "steps": "max_steps num_steps",
    "stop": "stop_strings stop_sequences",
    "teacher": "teacher_model teacher_model_name_or_path",
    "tensorboard": "report_to",
    "train_on": "assistant_only_loss completion_only_loss train_on_inputs mask_prompt train_on_responses_only",
    "value_clip": "cliprange_value",
    "value_coefficient": "vf_coef",
    "warmup": "warmup_ratio warmup_steps",
    "whiten": "whiten_rewards whiten_advantages",
    **{"dpo": "sigmoid", "exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair", "robust_dpo": "robust"},
    **{"sppo": "sppo_hard", "length_normalised_dpo": "sigmoid_norm"},
}


WORDS = {  # what takes the place of an option of other libraries, where it is not an option
    "reference_free": "losses without a reference are simpo, alphapo, orpo and cpo",
    "margin": "the margin of a pair is the entry 'margin' of its row, one for all pairs is loss_kwargs={'margin': ...}",
    "rpo_alpha": "it is the sum loss=['dpo', 'sft'] with loss_weights=[1, rpo_alpha]",
    "generate_many.strategy": "it samples, or takes the most probable tokens with greedy=True; generate has strategies",
    "generate_many.num_beams": "generate(..., strategy='beam', batch_size=...) searches with beams",
    "generate_many.batch_size": "rows is the number of completions that are decoded together",
}


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the option that an unknown name means, by what other libraries call it or by its spelling; or None."""
    names = list(names)
    known = [ours for ours in names if name in ELSEWHERE.get(ours, "").split()]
    return next(iter(known or difflib.get_close_matches(name, names, n=1)), None)


def takes(*groups: type) -> Callable[[Function], Function]:
    """Show the fields of dataclasses in the signature and the docstring of a function with `**options`.

    In the docstring they replace the line "Options: listed here.". Any other keyword argument is a TypeError with the
    nearest name.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind != inspect.Parameter.VAR_KEYWORD]
        fields = {field.name: (group, field) for group in groups for field in own_first(group)}
        further = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=field.type)
            for name, (_, field) in fields.items()
            if name not in signature.parameters
        ]
        names = [each.name for each in (*own, *further)]

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name not in names:
                    called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
                    raise _unexpected(called, name, names)
            return function(*args, **keywords)

        checked.__signature__ = signature.replace(parameters=[*own, *further])
        listed = [
            _line(f"{each.name} ({each.default!r}): {field_docs(fields[each.name][0])[each.name]}") for each in further
        ]
        checked.__doc__ = inspect.cleandoc(function.__doc__).replace(LISTED, "\n".join(["Options:", *listed]))
        return checked

    return decorate


FLOAT32, INT32 = 3.4028234663852886e38, 2.0**31 - 1  # the largest numbers of these types


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; with `above`, `low` itself is excluded. They must be finite as float32.

    Integers may be of any size, unless `int32` is set: then they must fit 32 bits.
    """

    low: float
    high: float = math.inf
    above: bool = False
    int32: bool = False

    def check(self, name: str, value: Any, *, integer: bool) -> None:
        """Raise ValueError for a value that is known and lies outside; traced numbers and JAX's placeholders pass."""
        kinds = str | bytes | bool | Mapping | list | tuple
        wrong = value is None or isinstance(value, kinds | float if integer else kinds)
        most = (INT32 if self.int32 else math.inf) if integer else FLOAT32
        if getattr(getattr(value, "dtype", None), "itemsize", 8) <= 4:
            most = math.inf  # 32 bits or fewer
        try:
            inside = (value > self.low if self.above else value >= self.low) & (value <= float(self.high))
            inside &= (value >= -most) & (value <= most) & (value > -math.inf) & (value < math.inf)
            inside = not wrong and bool(inside.all() if hasattr(inside, "all") else inside)
        except TypeError:
            inside = not wrong
        if not inside:
            kind = "an integer" if integer else "a finite number"
            where = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
            if math.isfinite(self.high):
                high = self.high if integer else f"{self.high:g}"
                kind = "an integer" if integer else "a number"
                where = f"in {'(' if self.above else '['}{self.low:g}, {high}]"
            elif not wrong and not getattr(value, "ndim", 0) and most < abs(value) < math.inf:
                where = f"of at most {most:.0f}" if integer else f"of at most {most:g} in size"
            elif not math.isfinite(self.low):
                where = ""
            raise ValueError(f"{name} must be {' '.join([kind, where]).strip()}, but is {value!r}.")


def number(
    default: float | None,
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    static: bool = False,
    int32: bool = False,
) -> Any:
    """A field whose value must lie in a `Range`. `static`: JAX compiles a program for each value."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high, above, int32), "static": static})


def check_characters(string: str, name: str) -> None:
    """Raise ValueError for a string that UTF-8 cannot encode: with a stray byte, or half a surrogate pair.

    Raises:
        TypeError: if it is not a string.
    """
    if not isinstance(string, str):
        raise TypeError(f"{name} must be a string, but is {string!r:.60}.")
    try:
        string.encode()
    except UnicodeEncodeError as error:
        found = ord(string[error.start])
        what = f"the byte 0x{found - 0xDC00:02x}" if 0xDC80 <= found <= 0xDCFF else f"\\u{found:04x}"
        raise ValueError(f"{name} must be text in UTF-8, but holds {what} at character {error.start + 1}.") from None


def counted(number: int, noun: str) -> str:
    """Return the number with the noun: "1 item", "2 items"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def check_type(name: str, value: Any, kind: type, expected: str) -> None:
    """Raise TypeError unless the value is an instance of `kind`; a class is not one of its instances."""
    if isinstance(value, type) or not isinstance(value, kind):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
        raise TypeError(f"{name} must be {expected}, but is {found}.")


STATIC = {"static": True}  # metadata of a field that JAX compiles a program for each value of


class Checked:
    """A dataclass whose fields are checked by their names, types and ranges when it is made."""

    def __new__(cls, *args: Any, **keywords: Any) -> Any:
        """Refuse a keyword that is not a field, and name the nearest one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in names:
                raise _unexpected(cls.__name__, name, names)
        return super().__new__(cls)

    def __post_init__(self):
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            _check(field, hints[field.name], getattr(self, field.name))


def _check(field: dataclasses.Field, hint: Any, value: Any) -> None:
    kinds = get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return
    choices = [each for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)]
    if choices and not any(value is each or value == each for each in choices):
        named = ", ".join(map(str, [*choices, None] if type(None) in kinds else choices))
        raise ValueError(f"{field.name} must be one of {named}, but is {value!r}.")
    if bool in kinds and not isinstance(value, bool):
        raise ValueError(f"{field.name} must be True or False, but is {value!r}.")
    text = field.type in ("str", "str | None") and not field.metadata.get("any_type")
    if text and not isinstance(value, str):
        raise TypeError(f"{field.name} must be a string, but is {value!r}.")
    if get_origin(hint) is dict and not isinstance(value, Mapping):
        raise TypeError(f"{field.name} must be a dict, but is {value!r}.")
    if "range" in field.metadata:
        field.metadata["range"].check(field.name, value, integer=int in kinds)


def _unexpected(called: str, name: str, names: Iterable[str]) -> TypeError:
    near = nearest(name, names)
    hint = f": did you mean {near!r}?" if near else ""
    words = WORDS.get(f"{called}.{name}") or WORDS.get(name)
    hint = f": {words}" if words else hint
    return TypeError(f"{called}() got an unexpected keyword argument {name!r}{hint}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases."""
    found: dict[str, str] = {}
    for each in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        for field, doc in itertools.pairwise(_classes(each.__module__)[each.__name__].body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                found[field.target.id] = " ".join(doc.value.value.split())
    return found


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the source of the classes of a module, which is parsed once."""
    source = inspect.getsource(sys.modules[module])
    return {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)}


def own_first(cls: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass, its own first, those of its most general bases last."""
    declared = [inspect.get_annotations(base) for base in cls.__mro__]
    place = {name: min(i for i, names in enumerate(declared) if name in names) for names in declared for name in names}
    return sorted(dataclasses.fields(cls), key=lambda field: place[field.name])


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _line(text: str) -> str:
    return textwrap.fill(text, 116, initial_indent=" " * 4, subsequent_indent=" " * 8)

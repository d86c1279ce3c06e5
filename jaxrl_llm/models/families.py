"""Model families of `config.json`: a row for each, with its fields, its description and the names of its tensors."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.models import rotary
from jaxrl_llm.models.decoder import Network, check_value
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.t5 import T5, T5Config
from jaxrl_llm.models.transformer import Decoder, Description, Experts, Layer, Norm, Norms, alibi_slopes


class Config(Mapping[str, Any]):
    """The fields of a `config.json` that change the function, checked and frozen; the others have defaults.

        Config("olmo2", vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)

    Fields are items and attributes. Sizes also go by Llama's names where the family has other ones.

    Raises:
        ValueError: for a field that is missing, unknown or does not fit.
    """

    def __init__(self, model_type: str, **given: Any):
        family = FAMILIES[model_type]
        if unknown := [name for name in given if name not in family.fields and name not in ROPE_FIELDS]:
            raise ValueError(f"{model_type} has no field {', '.join(unknown)}.")
        values = {}
        for name, default in family.fields.items():
            if isinstance(default, Maybe):
                values[name], kind = given.get(name, default.absent), default.kind
            elif isinstance(default, type):
                values[name], kind = given.get(name), default
            else:
                values[name], kind = (default if given.get(name) is None else given[name]), type(default)
            if values[name] is not None or isinstance(default, type):
                check_value(name, values[name], kind.__name__)
            if name in ACTIVATION_FIELDS:
                values[name] = ACTIVATION_NAMES.get(values[name], values[name])
        if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if "rope_parameters" in values:
            said = {name: value for name, value in given.items() if value is not None}
            values["rope_parameters"] = family.rope(family.rope_defaults | said)
        self.__dict__.update(model_type=model_type, _values=_frozen(values))
        self.description  # noqa: B018 (what does not fit together raises now)

    @functools.cached_property
    def description(self) -> Description:
        """The model as data."""
        return FAMILIES[self.model_type].describe(self)

    @property
    def name(self) -> str:
        """The family's name, such as Llama."""
        return FAMILIES[self.model_type].architecture.removesuffix("ForCausalLM")

    def replace(self, **changes: Any) -> Config:
        """Return the configuration with other values of these fields."""
        return Config(self.model_type, **self._values | changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON."""
        return json.loads(json.dumps(self._values))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        name = FAMILIES[self.model_type].aliases.get(name, name)
        if name not in self._values:
            raise AttributeError(f"{self.model_type} has no field {name}.")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a configuration is frozen; `replace` returns a changed one.")

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash((self.model_type, len(self._values), self.vocab_size, self.description))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and (self.model_type, self._values) == (other.model_type, other._values)

    def __repr__(self) -> str:
        return f"Config({self.model_type!r}, {', '.join(f'{name}={value!r}' for name, value in self._values.items())})"


ROPE_FIELDS = (  # of the older forms, beside `rope_parameters`
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_pct", "rotary_emb_base"),
    "original_max_position_embeddings",
)


ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
ACTIVATION_NAMES = {"swish": "silu"}  # two names of one


class Maybe(NamedTuple):
    """The kind of a field that may be null, and its value where it is absent."""

    kind: type
    absent: Any = None


class Count(int):
    """The default of a field that may also be 0."""


def _frozen(value: Any) -> Any:
    """Return a copy with tuples for lists."""
    if isinstance(value, Mapping):
        return {name: _frozen(each) for name, each in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """The Hugging Face format of one architecture."""

    architecture: str
    fields: Mapping[str, Any]  # a type if required, `type | None` if optional, else the default
    describe: Callable[[Config], Description] | None = None  # of a `Decoder`
    model: type[Network] = Decoder
    config: type | None = None  # of a model that is not a `Decoder`
    prefix: str = "model."  # of every tensor but the head; some files lack it
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the modules that are not named as Llama's
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the sizes that are not named as Llama's
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)  # other names of fields in some files
    rope: Callable[[Mapping[str, Any]], dict[str, Any]] = rotary.rope_parameters
    rope_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields beside `rope_parameters`
    transposed: bool = True  # linear kernels are stored [out, in]
    buffers: re.Pattern[str] = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attention\.bias|masked_bias)")
    refused: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields, with values that have no effect
    copies: tuple[str, ...] = ("lm_head.weight",)  # tensors, without prefix, that may repeat the embedding
    embedding: str = "embed_tokens.weight"
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # of adapters, by default

    @property
    def reward(self) -> str | None:
        """The architecture of a reward model in transformers; None if there is none."""
        if self.model is T5 or self.architecture in NO_REWARD:
            return None
        name = "Gemma3Text" if self.architecture == "Gemma3ForCausalLM" else self.architecture
        return re.sub("(ForCausalLM|LMHeadModel)$", "", name) + "ForSequenceClassification"


NO_REWARD = ("CohereForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM", "OlmoeForCausalLM")
SIZES = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), int)


def fields(length: int, kv_heads: int | None = None, **others: Any) -> dict[str, Any]:
    """Return the fields of most families, with the context length, key-value heads (as many as heads) and others."""
    common = {
        "intermediate_size": int,
        "num_key_value_heads": Maybe(int, kv_heads),
        "max_position_embeddings": length,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_parameters": Maybe(dict),
    }
    if "hidden_activation" in others:
        del common["hidden_act"]
    return SIZES | common | others


RMS = {"rms_norm_eps": 1e-6, "attention_bias": False}
LAYER = {"layer_norm_eps": 1e-5}
WINDOW = {"sliding_window": Maybe(int, 4096), "layer_types": Maybe(tuple)}
QWEN = WINDOW | {"use_sliding_window": False, "max_window_layers": Count(28)}
GPT = {  # GPT-2's names
    **dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head"), int),
    **{"n_inner": Maybe(int), "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    **{"initializer_range": 0.02},
}


def names(table: str) -> dict[str, str]:
    """Return a table of names, Llama's and the family's: "norm ln_f, layers h" is {"norm": "ln_f", "layers": "h"}."""
    return dict(pair.split() for pair in table.split(", "))


GPT_ALIASES = names(
    "hidden_size n_embd, intermediate_size n_inner, num_hidden_layers n_layer, num_attention_heads n_head, "
    "max_position_embeddings n_positions, hidden_act activation_function, layer_norm_eps layer_norm_epsilon"
)


def decoder(c: Config, norm: Norm, *, layers: tuple[Layer, ...] | None = None, **others: Any) -> Description:
    """Return the description of a decoder with rotary positions in every layer, as far as `others` do not change it."""
    kv_heads = getattr(c, "num_key_value_heads", c.num_attention_heads)
    if c.num_attention_heads % kv_heads:
        raise ValueError(
            "num_attention_heads must be a multiple of num_key_value_heads, "
            f"but they are {c.num_attention_heads} and {kv_heads}."
        )
    return Description(
        **{
            "vocab_size": c.vocab_size,
            "max_length": getattr(c, "max_position_embeddings", 0),
            "width": c.hidden_size,
            "inner": getattr(c, "intermediate_size", None) or 4 * c.hidden_size,
            "heads": c.num_attention_heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim(c),
            "layers": rotary_layers(c) if layers is None else layers,
            "norm": norm,
            "activation": getattr(c, "hidden_act", "gelu_new"),
            "biases": biases("qkvo", getattr(c, "attention_bias", False))
            | biases(["mlp"], getattr(c, "mlp_bias", False)),
            "tied": c.tie_word_embeddings,
            "std": c.initializer_range,
        }
        | others
    )


def biases(places: Any, given: bool = True) -> frozenset[str]:
    """Return the places if there are biases."""
    return frozenset(places) if given else frozenset()


def head_dim(c: Config) -> int:
    """Return the dimension of a head."""
    if given := getattr(c, "head_dim", None):
        return given
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(
            "hidden_size must be a multiple of num_attention_heads, "
            f"but they are {c.hidden_size} and {c.num_attention_heads}."
        )
    return c.hidden_size // c.num_attention_heads


def turning(c: Config, kind: str = "full_attention", *, interleaved: bool = False) -> rotary.Rotary:
    """Return the rotation of one kind of layer."""
    settings = c.rope_parameters
    settings = settings if "rope_type" in settings else settings.get(kind)
    if settings is None:
        raise ValueError(f"rope_parameters must have settings for {kind}, but has {', '.join(c.rope_parameters)}.")
    size = head_dim(c)
    if size % 2 and settings.get("partial_rotary_factor", 1) == 1:
        raise ValueError(f"the heads' dimension must be even for rotary positions, but is {size}.")
    return rotary.rotary(settings, size, max_length=c.max_position_embeddings, interleaved=interleaved)


def kinds(c: Config, every: int | None = None, *, window: bool = True) -> tuple[str, ...]:
    """Return the kind of each layer: as given, else every `every`-th has full attention and the others a window."""
    given, count = getattr(c, "layer_types", None), c.num_hidden_layers
    if given is None:
        full = [not window or (every is not None and (i + 1) % every == 0) for i in range(count)]
        given = tuple("full_attention" if each else "sliding_attention" for each in full)
    if len(given) != count or not set(given) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types must be full_attention or sliding_attention for each of {count} layers, but is {list(given)}."
        )
    return given


def rotary_layers(c: Config, types: tuple[str, ...] | None = None, *, interleaved: bool = False) -> tuple[Layer, ...]:
    """Return layers with rotary positions; those of sliding attention have the window."""
    window = getattr(c, "sliding_window", None)
    types = kinds(c, window=window is not None) if types is None else types
    turns = {kind: turning(c, kind, interleaved=interleaved) for kind in dict.fromkeys(types)}
    return tuple(Layer(turns[kind], window if kind == "sliding_attention" else None) for kind in types)


def rope_by_kind(given: Mapping[str, Any], *, theta: float, local: float | None = None) -> dict[str, Any]:
    """Return rotary settings for each kind of layer: of the older form, scaling is that of full attention alone."""
    settings = rotary.rope_parameters(given, theta=theta)
    if "rope_type" not in settings:
        return settings
    window = given.get("rope_local_base_freq") or (settings["rope_theta"] if local is None else local)
    return {"full_attention": settings, "sliding_attention": {"rope_type": "default", "rope_theta": window}}


def neox_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return GPT-NeoX's rotary settings, which have names of their own in older files."""
    older = {"rope_theta": given.get("rotary_emb_base"), "partial_rotary_factor": given.get("rotary_pct")}
    return rotary.rope_parameters(
        {**given, **{name: value for name, value in older.items() if value is not None}}, rotated=0.25
    )


def rms(c: Config, **others: Any) -> Description:
    """Return a decoder with RMS norms, as Llama."""
    return decoder(c, Norm("rms", c.rms_norm_eps), **others)


GEMMA_NORMS = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
NORMS_AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def gemma(c: Config, **others: Any) -> Description:
    """Return Gemma (Gemma Team 2024): scales are 1 + w, embeddings are multiplied by √width, the gate is a GELU."""
    legacy = c.model_type == "gemma" and c.hidden_act == "gelu"  # a value of its first files
    options = {"activation": "gelu_pytorch_tanh"} if legacy else {}
    options |= {"embedding_scale": math.sqrt(c.hidden_size)} | others
    return decoder(c, Norm("rms", c.rms_norm_eps, offset=1.0), **options)


def gemma2(c: Config, every: int = 2, **others: Any) -> Description:
    """Return Gemma 2: four norms, capped scores and logits, a window in every other layer."""
    return gemma(
        c,
        layers=rotary_layers(c, kinds(c, every)),
        norms=GEMMA_NORMS,
        score_scale=c.query_pre_attn_scalar**-0.5,
        score_cap=c.attn_logit_softcapping,
        logit_cap=c.final_logit_softcapping,
        **others,
    )


def smollm3(c: Config) -> Description:
    """Return SmolLM3: no rotary positions in every fourth layer."""
    every, given = c.no_rope_layer_interval, c.no_rope_layers
    turns = [(i + 1) % every != 0 for i in range(c.num_hidden_layers)]
    turns = turns if given is None else given[: c.num_hidden_layers]
    if len(turns) != c.num_hidden_layers:
        raise ValueError(f"no_rope_layers must have {c.num_hidden_layers} values, but has {len(turns)}.")
    used = c.use_sliding_window or c.layer_types is not None  # types that are given hold whether it is "used" or not
    types = kinds(c) if c.layer_types else ["full_attention" if turn else "sliding_attention" for turn in turns]
    layers = [
        Layer(turning(c) if turn else None, c.sliding_window if used and kind == "sliding_attention" else None)
        for turn, kind in zip(turns, types, strict=True)
    ]
    return rms(c, layers=tuple(layers))


def qwen2(c: Config, **others: Any) -> Description:
    """Return Qwen 2: biases of q, k and v; a window, if used, from layer `max_window_layers` on."""
    first = c.max_window_layers if c.use_sliding_window and c.sliding_window else c.num_hidden_layers
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(c.num_hidden_layers)]
    layers = rotary_layers(c, c.layer_types or tuple(types))
    return rms(c, **{"layers": layers, "biases": biases("qkv")} | others)


def qwen3_moe(c: Config) -> Description:
    """Return Qwen 3 with experts in every `decoder_sparse_step`-th layer."""
    window = c.sliding_window if c.use_sliding_window else None
    layers = tuple(
        Layer(turning(c), window, i not in c.mlp_only_layers and (i + 1) % c.decoder_sparse_step == 0)
        for i in range(c.num_hidden_layers)
    )
    experts = Experts(c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.norm_topk_prob)
    return rms(c, layers=layers, head_norm="head", experts=experts)


def sparse(c: Config, count: int, normalised: bool, **others: Any) -> Description:
    """Return a decoder with experts in every layer."""
    layers = tuple(layer._replace(sparse=True) for layer in rotary_layers(c))
    experts = Experts(count, c.num_experts_per_tok, c.intermediate_size, normalised)
    return rms(c, layers=layers, experts=experts, **others)


def layer_norm(c: Config, **others: Any) -> Description:
    """Return a decoder with LayerNorms and biases everywhere, as GPT-2, without gate."""
    options = {"gated": False, "biases": biases(["q", "k", "v", "o", "mlp"])} | others
    return decoder(c, Norm("layer", c.layer_norm_eps, bias=True), **options)


def stablelm(c: Config) -> Description:
    """Return StableLM (Bellagente et al. 2024): LayerNorms, and rotary positions in a part of each head."""
    return layer_norm(
        c,
        gated=True,
        biases=biases("qkv", c.use_qkv_bias),
        head_norm="each" if c.qk_layernorm else None,
        parallel=c.use_parallel_residual,
        norms=Norms(mlp_in=None) if c.use_parallel_residual else Norms(),
    )


def cohere(c: Config, head_norm: bool = False, **others: Any) -> Description:
    """Return Cohere's Command R: parallel with one LayerNorm without bias, interleaved rotary pairs, scaled logits."""
    layers = rotary_layers(c, interleaved=True)
    options = {"layers": layers, "norms": Norms(mlp_in=None), "parallel": True, "logit_scale": c.logit_scale}
    norm = Norm("layer", c.layer_norm_eps)
    return decoder(c, norm, **options | {"head_norm": "each" if head_norm else None} | others)


def cohere2(c: Config) -> Description:
    """Return Command R7B: rotary positions in the layers with a window alone."""
    types = kinds(c, c.sliding_window_pattern)
    layers = rotary_layers(c, types, interleaved=True)
    full = [layer if kind == "sliding_attention" else Layer() for layer, kind in zip(layers, types, strict=True)]
    return cohere(c, layers=tuple(full))


def granite(c: Config) -> Description:
    """Return Granite: Llama with multipliers."""
    return rms(
        c,
        embedding_scale=c.embedding_multiplier,
        residual_scale=c.residual_multiplier,
        score_scale=c.attention_multiplier,
        logit_scale=1 / c.logits_scaling,
    )


def gpt_neox(c: Config) -> Description:
    """Return GPT-NeoX (Black et al. 2022), such as Pythia: parallel with two norms, q, k and v fused head by head."""
    places = biases(["q", "o"], c.attention_bias) | {"mlp"}
    return layer_norm(c, fused="groups", parallel=c.use_parallel_residual, biases=places)


def phi(c: Config) -> Description:
    """Return Phi (Li et al. 2023): parallel with one LayerNorm, biases everywhere, in the head too."""
    places = biases(["q", "k", "v", "o", "mlp", "head"])
    return layer_norm(c, norms=Norms(mlp_in=None), parallel=True, biases=places)


def gptj(c: Config) -> Description:
    """Return GPT-J (Wang and Komatsuzaki 2021): parallel with one norm, interleaved rotary pairs, a head with bias."""
    if c.rotary_dim % 2 or c.rotary_dim > head_dim(c):
        raise ValueError(f"rotary_dim must be even and at most the heads' {head_dim(c)}, but is {c.rotary_dim}.")
    turn = rotary.rotary({"rope_theta": 10000.0}, c.rotary_dim, max_length=c.n_positions, interleaved=True)
    return layer_norm(
        c,
        layers=(Layer(turn),) * c.n_layer,
        norms=Norms("ln_1", None, None),
        parallel=True,
        biases=biases(["mlp", "head"]),
    )


def gpt_neo(c: Config) -> Description:
    """Return GPT-Neo (Black et al. 2021): scores are not scaled, and every other layer has a window."""
    if c.attention_layers is not None:
        types = c.attention_layers
    else:
        types = [kind for pattern, count in c.attention_types for kind in tuple(pattern) * count]
    if len(types) != c.num_layers or not set(types) <= {"global", "local"}:
        raise ValueError(f"attention_layers must be global or local for each of {c.num_layers} layers, but is {types}.")
    layers = tuple(Layer(None, c.window_size if kind == "local" else None) for kind in types)
    options = {"norms": Norms("ln_1", None, "ln_2"), "score_scale": 1.0, "learned_positions": 0}
    return layer_norm(c, layers=layers, biases=biases(["o", "mlp"]), **options)


def opt(c: Config) -> Description:
    """Return OPT (Zhang et al. 2022): learned positions from row 2 of their table on."""
    return decoder(
        c,
        Norm("layer", 1e-5, scale=c.layer_norm_elementwise_affine, bias=c.layer_norm_elementwise_affine),
        layers=(Layer(),) * c.num_hidden_layers,
        norms=Norms("self_attn_layer_norm", None, "final_layer_norm"),
        gated=False,
        biases=biases(["q", "k", "v", "o", "mlp"], c.enable_bias),
        learned_positions=2,
    )


def bloom(c: Config) -> Description:
    """Return BLOOM (BigScience 2022): ALiBi, a norm of the embeddings, q, k and v fused head by head."""
    options = {"layers": (Layer(),) * c.n_layer, "max_length": NO_LIMIT, "alibi": alibi_slopes(c.n_head)}
    return layer_norm(c, fused="groups", embedding_norm=True, **options)


NO_LIMIT = 1 << 20  # ALiBi has no longest position


def falcon(c: Config) -> Description:
    """Return Falcon (Almazrouei et al. 2023): one key head for all (7B), or for each group (40B), fused."""
    new = c.new_decoder_architecture
    kv_heads = (c.num_kv_heads or c.num_attention_heads) if new else 1 if c.multi_query else c.num_attention_heads
    parallel = new or c.parallel_attn
    two = (c.num_ln_in_parallel_attn or 2) == 2
    norms = Norms("ln_attn", None, "ln_mlp") if new and two else Norms(mlp_in=None) if parallel else Norms()
    slopes = tuple(slope * head_dim(c) ** -0.5 for slope in alibi_slopes(c.num_attention_heads)) if c.alibi else ()
    layers = {"layers": (Layer(),) * c.num_hidden_layers} if c.alibi else {}
    places = biases(["q", "o", "mlp"], c.bias)
    options = {"kv_heads": kv_heads, "norms": norms, "parallel": parallel, "alibi": slopes, "biases": places}
    return layer_norm(c, fused="groups", **options | layers)


# The modules of a family by Llama's names and by its own. BLOOM's and Falcon's:
BLOCK = names(
    "layers h, norm ln_f, embed_tokens word_embeddings, embed_norm word_embeddings_layernorm, "
    "self_attn.qkv_proj self_attention.query_key_value, self_attn.o_proj self_attention.dense, "
    "mlp.up_proj mlp.dense_h_to_4h, mlp.down_proj mlp.dense_4h_to_h"
)
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256}
GEMMA2 = {name: value for name, value in GEMMA.items() if name != "hidden_act"} | {
    **{"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    **{"final_logit_softcapping": Maybe(float, 30.0), "attn_logit_softcapping": Maybe(float, 50.0)},
}
UNCAPPED = dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), Maybe(float))
SPARSE = {"num_experts_per_tok": 2, "sliding_window": Maybe(int)}
FUSED = ("query_key_value",)
rope = functools.partial(functools.partial, rotary.rope_parameters)


def t5(architecture: str, **defaults: Any) -> Family:
    """Return the row of T5 or of its kin, with what differs in the defaults of the format."""
    return Family(
        architecture,
        dict.fromkeys(("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"), int) | defaults,
        model=T5,
        config=T5Config,
        prefix="",
        buffers=re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
        refused={"is_encoder_decoder": (None, True), "is_decoder": (None, False)},
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        embedding="shared.weight",
        targets=("q", "v"),
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head"), int),
        model=GPT2,
        config=GPT2Config,
        prefix="transformer.",
        transposed=False,
        refused={"add_cross_attention": (None, False)},
        embedding="wte.weight",
        targets=("c_attn",),
    ),
    "llama": Family("LlamaForCausalLM", fields(2048, **RMS, head_dim=Maybe(int), mlp_bias=False), rms),
    "mistral": Family(
        "MistralForCausalLM",
        fields(131072, 8, rms_norm_eps=1e-6, head_dim=Maybe(int), **WINDOW),
        rms,
    ),
    "qwen2": Family("Qwen2ForCausalLM", fields(32768, 32, rms_norm_eps=1e-6, **QWEN), qwen2),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        fields(32768, 32, **RMS, **QWEN, head_dim=128),
        lambda c: qwen2(c, head_norm="head", biases=biases("qkvo", c.attention_bias)),
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        fields(8192, 16, **RMS | GEMMA),
        gemma,
        refused={"use_bidirectional_attention": (None, False)},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fields(8192, 4, **RMS | GEMMA2 | WINDOW),
        gemma2,
        aliases={"hidden_act": "hidden_activation"},
        refused={"use_bidirectional_attention": (None, False)},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fields(131072, 4, **RMS | GEMMA2 | WINDOW | UNCAPPED, sliding_window_pattern=6),
        lambda c: gemma2(c, c.sliding_window_pattern, head_norm="head"),
        aliases={"hidden_act": "hidden_activation"},
        rope=functools.partial(rope_by_kind, theta=1000000.0, local=10000.0),
        refused={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        fields(2048, attention_bias=False, clip_qkv=Maybe(float)),
        lambda c: decoder(c, Norm("layer", 1e-5, scale=False), clip=c.clip_qkv),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        fields(2048, rms_norm_eps=1e-5, attention_bias=False),
        lambda c: rms(c, norms=NORMS_AFTER, head_norm="all"),
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        fields(2048, rms_norm_eps=1e-5, attention_bias=False, **WINDOW),
        lambda c: rms(c, layers=rotary_layers(c, kinds(c, 4)), norms=NORMS_AFTER, head_norm="all"),
        rope=functools.partial(rope_by_kind, theta=500000.0),
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        fields(
            *(32768, 4),
            **RMS | {"layer_types": Maybe(tuple), "sliding_window": Maybe(int), "use_sliding_window": False},
            **{"no_rope_layers": Maybe(tuple), "no_rope_layer_interval": 4, "mlp_bias": False},
        )
        | {"tie_word_embeddings": True},
        smollm3,
        rope=rope(theta=2000000.0),
    ),
    "phi": Family(
        "PhiForCausalLM",
        fields(2048, **LAYER) | {"hidden_act": "gelu_new"},
        phi,
        names=names(
            "norm final_layernorm, self_attn.o_proj self_attn.dense, mlp.up_proj mlp.fc1, mlp.down_proj mlp.fc2"
        ),
        refused={"qk_layernorm": (None, False)},
        rope=rope(rotated=0.5),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        fields(4096, rms_norm_eps=1e-5, sliding_window=Maybe(int), original_max_position_embeddings=4096),
        lambda c: rms(c, fused="blocks", fused_gate=True),
        rope=rope(rotated=1.0),
        rope_defaults={"original_max_position_embeddings": 4096},
        targets=("qkv_proj",),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        fields(2048, **LAYER, attention_bias=True, use_parallel_residual=True) | {"hidden_act": "gelu"},
        gpt_neox,
        prefix="gpt_neox.",
        names=names(
            "embed_tokens embed_in, norm final_layer_norm, lm_head embed_out, "
            "self_attn.qkv_proj attention.query_key_value, self_attn.o_proj attention.dense, "
            "mlp.up_proj mlp.dense_h_to_4h, mlp.down_proj mlp.dense_4h_to_h"
        ),
        copies=("embed_out.weight",),
        embedding="embed_in.weight",
        rope=neox_rope,
        targets=FUSED,
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        fields(4096, **LAYER, use_qkv_bias=False, qk_layernorm=False, use_parallel_residual=False),
        stablelm,
        names=names("self_attn.q_norm self_attn.q_layernorm.norms.{}, self_attn.k_norm self_attn.k_layernorm.norms.{}"),
        rope=rope(rotated=0.25),
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        {
            **dict.fromkeys(("vocab_size", "hidden_size", "num_layers", "num_heads"), int),
            **{"intermediate_size": Maybe(int), "max_position_embeddings": 2048, "activation_function": "gelu_new"},
            **{"layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True},
            **{"window_size": 256, "attention_layers": Maybe(tuple)},
            "attention_types": ((("global", "local"), 12),),
        },
        gpt_neo,
        prefix="transformer.",
        names=names(
            "layers h, norm ln_f, embed_tokens wte, embed_positions wpe, self_attn.q_proj attn.attention.q_proj, "
            "self_attn.k_proj attn.attention.k_proj, self_attn.v_proj attn.attention.v_proj, "
            "self_attn.o_proj attn.attention.out_proj, mlp.up_proj mlp.c_fc, mlp.down_proj mlp.c_proj"
        ),
        aliases=names(
            "num_hidden_layers num_layers, num_attention_heads num_heads, hidden_act activation_function, "
            "layer_norm_eps layer_norm_epsilon"
        ),
        embedding="wte.weight",
    ),
    "gptj": Family(
        "GPTJForCausalLM",
        GPT | {"n_positions": 2048, "rotary_dim": 64, "tie_word_embeddings": False},
        gptj,
        prefix="transformer.",
        names=names(
            "layers h, norm ln_f, embed_tokens wte, self_attn.q_proj attn.q_proj, self_attn.k_proj attn.k_proj, "
            "self_attn.v_proj attn.v_proj, self_attn.o_proj attn.out_proj, mlp.up_proj mlp.fc_in, "
            "mlp.down_proj mlp.fc_out"
        ),
        aliases=GPT_ALIASES,
        embedding="wte.weight",
    ),
    "opt": Family(
        "OPTForCausalLM",
        {
            **dict.fromkeys((*SIZES, "ffn_dim"), int),
            **{"max_position_embeddings": 2048, "activation_function": "relu", "init_std": 0.02, "enable_bias": True},
            **{"layer_norm_elementwise_affine": True, "tie_word_embeddings": True},
        },
        opt,
        prefix="model.decoder.",
        names=names("norm final_layer_norm, self_attn.o_proj self_attn.out_proj, mlp.up_proj fc1, mlp.down_proj fc2"),
        aliases=names("intermediate_size ffn_dim, hidden_act activation_function, initializer_range init_std"),
        refused={"do_layer_norm_before": (None, True), "_remove_final_layer_norm": (None, False)},
    ),
    "falcon": Family(
        "FalconForCausalLM",
        SIZES
        | {
            **{"num_kv_heads": Maybe(int), "ffn_hidden_size": Maybe(int), "num_ln_in_parallel_attn": Maybe(int)},
            **{"layer_norm_epsilon": 1e-5, "activation": "gelu", "initializer_range": 0.02},
            **{"max_position_embeddings": 2048, "rope_parameters": Maybe(dict), "tie_word_embeddings": True},
            **{"alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
            "bias": False,
        },
        falcon,
        spellings={"n_embed": "hidden_size"},
        prefix="transformer.",
        names=BLOCK,
        aliases=names("intermediate_size ffn_hidden_size, hidden_act activation, layer_norm_eps layer_norm_epsilon"),
        embedding="word_embeddings.weight",
        targets=FUSED,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        {
            **dict.fromkeys(("vocab_size", "hidden_size", "n_layer", "n_head"), int),
            **{"layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True},
        },
        bloom,
        prefix="transformer.",
        names=BLOCK,
        aliases=names("num_hidden_layers n_layer, num_attention_heads n_head, layer_norm_eps layer_norm_epsilon"),
        refused={"apply_residual_connection_post_layernorm": (None, False)},
        spellings=names("n_embed hidden_size, num_hidden_layers n_layer, num_attention_heads n_head"),
        embedding="word_embeddings.weight",
        targets=FUSED,
    ),
    "cohere": Family(
        "CohereForCausalLM",
        fields(8192, **LAYER, attention_bias=False, logit_scale=0.0625, use_qk_norm=False)
        | {"tie_word_embeddings": True},
        lambda c: cohere(c, c.use_qk_norm),
        rope=rope(theta=500000.0),
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        fields(8192, **LAYER, **WINDOW, attention_bias=False, logit_scale=0.0625, sliding_window_pattern=4)
        | {"tie_word_embeddings": True},
        cohere2,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        fields(
            *(2048, None),
            **RMS | {"mlp_bias": False, "embedding_multiplier": 1.0, "residual_multiplier": 1.0},
            **{"attention_multiplier": 1.0, "logits_scaling": 1.0},
        ),
        granite,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        fields(131072, 8, rms_norm_eps=1e-5, **SPARSE, head_dim=Maybe(int), num_local_experts=8),
        lambda c: sparse(c, c.num_local_experts, True),
        names=names(
            "mlp.gate block_sparse_moe.gate, mlp.experts.gate_proj block_sparse_moe.experts.{}.w1, "
            "mlp.experts.up_proj block_sparse_moe.experts.{}.w3, mlp.experts.down_proj block_sparse_moe.experts.{}.w2"
        ),
        rope=rope(theta=1000000.0),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        fields(
            *(4096, None),
            **{"rms_norm_eps": 1e-5, "attention_bias": False, "clip_qkv": Maybe(float)},
            **{"num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False},
        ),
        lambda c: sparse(c, c.num_experts, c.norm_topk_prob, head_norm="all", clip=c.clip_qkv),
        spellings={"num_local_experts": "num_experts"},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        fields(
            *(32768, 4),
            **RMS | {"sliding_window": Maybe(int, 4096), "use_sliding_window": False, "head_dim": Maybe(int)},
            **{"num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False, "moe_intermediate_size": 768},
            **{"decoder_sparse_step": 1, "mlp_only_layers": ()},
        ),
        qwen3_moe,
        spellings={"num_local_experts": "num_experts"},
    ),
    "t5": t5("T5ForConditionalGeneration"),
    "mt5": t5("MT5ForConditionalGeneration", feed_forward_proj="gated-gelu", decoder_start_token_id=0),
    "umt5": t5("UMT5ForConditionalGeneration", feed_forward_proj="gated-gelu", decoder_start_token_id=0),
}
EXPERTS = {f"mlp.experts.{name}": f"mlp.experts.{{}}.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


def stored_name(family: Family, path: tuple[str | int, ...]) -> str:
    """Return the name, without prefix, of the tensor that holds a parameter; with {} for each of a stack of tensors.

    ("layers", 0, "mlp", "up_proj", "kernel") is layers.0.mlp.up_proj.weight, or what the family's table calls it.
    """
    *modules, leaf = map(str, path)
    at = 2 if modules[0] == "layers" else 0
    module = ".".join(modules[at:])
    module = family.names.get(module, EXPERTS.get(module, module))
    head = [family.names.get("layers", "layers"), modules[1]] if at else []
    return ".".join([*head, module, "bias" if leaf == "bias" else "weight"])


Llama = StableLM = Decoder


def LlamaConfig(**fields: Any) -> Config:
    """Return a Llama configuration; the defaults are those of SmolLM2-135M."""
    smollm2 = {
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192},
        **{"rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True},
    }
    return Config("llama", **smollm2 | fields)


def StableLMConfig(**fields: Any) -> Config:
    """Return a StableLM configuration; the defaults are those of StableLM-Zephyr-3B."""
    zephyr = {
        **{"vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    }
    return Config("stablelm", **zephyr | fields)


# Configurations -------------------------------------------------------------------------------------------------------


def family_of(model: Network) -> tuple[str, Family]:
    """Return `model_type` and family of a model."""
    if isinstance(model, Decoder | T5):
        return model.config.model_type, FAMILIES[model.config.model_type]
    for model_type, family in FAMILIES.items():
        if family.config is not None and isinstance(model, family.model):
            return model_type, family
    raise ValueError(f"{type(model).__name__} has no Hugging Face form; {', '.join(FAMILIES)} have one.")


def model_from_config(config: dict[str, Any], *, source: str, tensor_names: Callable[[], set[str]] = set) -> Network:
    """Return the model that a `config.json` describes.

    Args:
        tensor_names: returns the names of the folder's tensors, for what the configuration leaves open;
            `lm_head.weight` is among them only if it differs from the embedding.

    Raises:
        ValueError: for an architecture or a setting that is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{source}: model_type must be one of {', '.join(FAMILIES)}, but is {model_type!r}.")
    family = FAMILIES[model_type]
    for field, harmless in family.refused.items():
        if config.get(field) not in harmless:
            raise ValueError(f"{source}: {field} = {config[field]!r} is not supported.")
    if family.config is None:
        known = (*family.fields, *ROPE_FIELDS)
        config = config | {family.spellings[name]: value for name, value in config.items() if name in family.spellings}
        values = {name: value for name, value in config.items() if name in known}
    else:
        known = {field.name for field in dataclasses.fields(family.config)}
        values = {name: value for name, value in config.items() if name in known}
        if family.model is T5:
            defaults = {name: default for name, default in family.fields.items() if default is not int}
            values = defaults | values | _t5(defaults | config, source, tensor_names)
    if missing := [name for name, kind in family.fields.items() if kind is int and config.get(name) is None]:
        raise ValueError(f"{source}: the configuration lacks {', '.join(missing)}.")
    try:
        return Decoder(Config(model_type, **values)) if family.config is None else family.model(family.config(**values))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def without_head(model: Network) -> Network:
    """Return the model without a head of its own, as a reward model is stored: its unembedding is the embedding."""
    if isinstance(model, Decoder) and not model.config.tie_word_embeddings:
        return dataclasses.replace(model, config=model.config.replace(tie_word_embeddings=True))
    return model


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Raise ValueError if a size that `config.json` claims is larger than the files can hold.

    A model of that size is not built, even as shapes alone.
    """
    largest = max([1 << 16, *map(math.prod, shapes.values())])
    for name, value in config.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers") and value > max(
            64, len(shapes)
        ):
            raise ValueError(f"{source}: {name} is {value}, but the files hold {len(shapes)} tensors.")
        if name in CLAIMED and value > largest:
            raise ValueError(f"{source}: {name} is {value}, but no tensor has more than {largest} numbers.")


DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
CLAIMED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("n_embd", "n_head", "n_inner", "num_heads", "ffn_dim", "num_kv_heads", "ffn_hidden_size", "d_model", "d_kv"),
    *("d_ff", "moe_intermediate_size", "num_experts", "num_local_experts"),
)

# The language model of a multimodal checkpoint ------------------------------------------------------------------------

TEXT_SIZES = {  # that a `text_config` may leave out: transformers' defaults
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8},
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32},
}
OTHERS = re.compile(r"(model\.)?(vision_|visual|multi_modal_projector|image_newline|audio_|embed_vision|embed_audio)")


def text_config(config: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Return the configuration of the language model of a multimodal checkpoint; that of a plain one is itself."""
    inner = config.get("text_config")
    if inner is None or config.get("model_type") in FAMILIES:
        return config
    if not isinstance(inner, dict):
        raise ValueError(f"{source}: text_config must be an object, but is {inner!r}.")
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")  # these decide
    found = {name: config[name] for name in outer if config.get(name) is not None}
    return TEXT_SIZES.get(inner.get("model_type"), {}) | inner | found | {"multimodal": config.get("model_type")}


def text_tensors(
    config: Mapping[str, Any], tensors: Iterator[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of the language model of a multimodal checkpoint, under the names of a plain one."""
    for name, tensor in tensors:
        if "multimodal" not in config:
            yield name, tensor
        elif not OTHERS.match(name):
            name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
            yield name.replace("model.lm_head.", "lm_head."), tensor


def _t5(config: dict[str, Any], source: str, tensor_names: Callable[[], set[str]]) -> dict[str, Any]:
    """Return T5's fields that have more than one spelling.

    Before transformers 5, `tie_word_embeddings` decided over the head and its scale. Since then it is always true,
    `scale_decoder_outputs` decides over the scale of a T5, and the head is tied unless the files have a head that
    differs from the embedding. An mT5 has no scale. A umT5 has one, by its original, where it is said to be tied;
    transformers 5.23 scales every umT5 that it loads.
    """
    model_type, tied = config["model_type"], config.get("tie_word_embeddings")
    scaled = config.get("scale_decoder_outputs")
    tied = True if tied is None else tied
    values = {"tie_word_embeddings": tied, "scale_decoder_outputs": scaled}
    if scaled is None:
        values["scale_decoder_outputs"] = False if model_type == "mt5" else tied
    if tied is True and (model_type != "t5" or isinstance(scaled, bool)) and "lm_head.weight" in tensor_names():
        values["tie_word_embeddings"] = False
    if config.get("decoder_start_token_id") is None:
        values["decoder_start_token_id"] = config.get("pad_token_id") or 0
    projection, named = config.get("feed_forward_proj", "relu"), config.get("dense_act_fn")
    meant = "gelu_new" if projection == "gated-gelu" else str(projection).removeprefix("gated-")
    if named not in (None, meant):
        raise ValueError(f"{source}: feed_forward_proj is {projection!r}, but dense_act_fn is {named!r}.")
    return values


def config_of(model: Network) -> dict[str, Any]:
    """Return the `config.json` of a model."""
    model_type, family = family_of(model)
    config = model.config.to_dict() if family.config is None else dataclasses.asdict(model.config)
    if family.model is T5:
        config["num_decoder_layers"] = model.config.decoder_layers
        config["scale_decoder_outputs"] = model.config.output_scale != 1
        config["is_encoder_decoder"] = True
    absent = {name: default.absent for name, default in family.fields.items() if isinstance(default, Maybe)}
    # transformers reads some fields that are null, such as `head_dim`, otherwise than those that are absent.
    config = {name: value for name, value in config.items() if value is not None or absent.get(name) is not None}
    return {"architectures": [family.architecture], "model_type": model_type, **config}

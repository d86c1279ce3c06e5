"""Model families of `config.json`: a row for each, with its fields, its traits and the names of its tensors."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.models import rotary
from jaxrl_llm.models.decoder import Network, check_multiple
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.models.t5 import T5, T5Config
from jaxrl_llm.models.transformer import Decoder, Description, Layer, Norm, Norms


class Maybe(NamedTuple):
    """The kind of a field that may be null, and its value where it is absent."""

    kind: type
    absent: Any = None


class Only(NamedTuple):
    """A field that must be absent, null or this value, which has no effect."""

    harmless: Any = None


class Count(int):
    """The default of a field that may also be 0."""


def pairs(table: str) -> dict[str, str]:
    """Return a table of names: "norm ln_f, layers h" is {"norm": "ln_f", "layers": "h"}."""
    return dict(pair.split() for pair in table.split(", ") if pair)


Traits = Mapping[str, Any]  # what a family's `Description` has beside what the fields say


@dataclasses.dataclass(frozen=True)
class Family:
    """The Hugging Face format of one architecture. Fields and modules go by Llama's names."""

    name: str
    kinds: Mapping[str, Any]  # of fields: a type if it is required, `Maybe` if it may be null, `Only`, else the default
    traits: Traits | Callable[[Any], Traits] = dataclasses.field(default_factory=dict)  # or from a `Config`
    model: type[Network] = Decoder
    config: type | None = None  # of a model that is not a `Decoder`
    names: str = ""  # the fields and modules that have other names, as `pairs`
    spellings: str = ""  # further names of fields in some files, as `pairs`
    transposed: bool = True  # linear kernels are stored [out, in]
    buffers: re.Pattern[str] = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attention\.bias|masked_bias)")
    copies: tuple[str, ...] = ("lm_head.weight",)  # tensors, without prefix, that may repeat the embedding
    targets: tuple[str, ...] = ("q_proj", "v_proj")  # of adapters, by default

    @functools.cached_property
    def own(self) -> dict[str, str]:
        """The family's own names of fields and modules, where they are not Llama's."""
        return pairs(self.names)

    @property
    def prefix(self) -> str:
        """The prefix of the name of every tensor but the head; some files lack it."""
        return "" if self.model is T5 else f"{self.own.get('model', 'model')}."

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The kinds of the fields that have an effect, by the family's own names."""
        return {self.own.get(name, name): kind for name, kind in self.kinds.items() if not isinstance(kind, Only)}

    @property
    def embedding(self) -> str:
        """The name of the token embedding's tensor."""
        return self.stored_name(("embed_tokens", "embedding"))

    @property
    def architecture(self) -> str:
        """The architecture as in `config.json`."""
        return self.name + {GPT2: "LMHeadModel", T5: "ForConditionalGeneration"}.get(self.model, "ForCausalLM")

    @property
    def reward(self) -> str | None:
        """The architecture of a reward model in transformers; None if there is none."""
        name = {"Gemma3": "Gemma3Text"}.get(self.name, self.name)
        return None if self.model is T5 or name in NO_REWARD else f"{name}ForSequenceClassification"

    def bare_name(self, name: str) -> str:
        """Return the name of a tensor without prefix, of which files of a bare model lack the first part."""
        first, _, others = self.prefix.partition(".")
        return name.removeprefix(f"{first}.").removeprefix(others)

    def stored_name(self, path: tuple[str | int, ...]) -> str:
        """Return the name, without prefix, of the tensor that holds a parameter, with {} for each of a stack of them.

        ("layers", 0, "mlp", "up_proj", "kernel") is layers.0.mlp.up_proj.weight, or what the table calls it, which may
        have a name for the module or for what it is in.
        """
        *modules, leaf = map(str, path)
        layer = [self.own.get("layers", "layers"), modules[1]] if modules[0] == "layers" else []
        table, tail = {"mlp.experts": "mlp.experts.{}"} | self.own, modules[len(layer) :]
        parent = ".".join(tail[:-1])
        name = table.get(".".join(tail)) or ".".join([*filter(None, [table.get(parent, parent)]), tail[-1]])
        return ".".join([*layer, name, "bias" if leaf == "bias" else "weight"])


NO_REWARD = ("Cohere", "Cohere2", "Granite", "Olmoe")


# Descriptions ---------------------------------------------------------------------------------------------------------

SAID = pairs(  # the fields that say a part of the description in so many words
    "vocab_size vocab_size, max_position_embeddings max_length, hidden_size width, intermediate_size inner, "
    "num_attention_heads heads, num_key_value_heads kv_heads, hidden_act activation, tie_word_embeddings tied, "
    "initializer_range std, rms_norm_eps epsilon, layer_norm_eps epsilon, use_parallel_residual parallel, "
    "clip_qkv clip, attn_logit_softcapping score_cap, final_logit_softcapping logit_cap, logit_scale logit_scale, "
    "embedding_multiplier embedding_scale, residual_multiplier residual_scale, attention_multiplier score_scale, "
    "num_experts experts, num_experts_per_tok chosen, norm_topk_prob normalised, moe_intermediate_size expert_width"
)
QKV, QKVO, MLP = map(frozenset, ("qkv", "qkvo", ["mlp"]))  # where biases are
EVERYWHERE = QKVO | MLP
BIASES = {"attention_bias": QKVO, "mlp_bias": MLP, "use_qkv_bias": QKV, "bias": EVERYWHERE, "enable_bias": EVERYWHERE}
ONE_NORM = Norms(mlp_in=None)
NORMS_AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
FOUR_NORMS = NORMS_AFTER._replace(attention_in="input_layernorm", mlp_in="pre_feedforward_layernorm")
LAYER_NORM = Norm("layer", bias=True)
PLAIN = {"norm": LAYER_NORM, "gate": None}  # as GPT-2
ALIBI = {"alibi": 1.0, "max_length": 1 << 20}  # it has no longest position
COMMAND_R = {"norm": Norm("layer"), "norms": ONE_NORM, "parallel": True, "interleaved": True}


def describe(c: Any, traits: Traits | Callable[[Any], Traits]) -> Description:
    """Return the description that the fields of a `configuration.Config` give with the traits of its family.

    What neither gives is Llama's, such as rotary positions in every layer.
    """
    traits = dict(traits(c) if callable(traits) else traits)
    said = {ours: getattr(c, theirs) for theirs, ours in SAID.items() if getattr(c, theirs, None) is not None}
    usual = {"norm": Norm(), "norms": Norms(), "inner": 4 * c.hidden_size}
    usual |= {"kv_heads": c.num_attention_heads, "head_dim": head_dim(c)}
    if getattr(c, "qk_layernorm", False) or getattr(c, "use_qk_norm", False):
        usual["head_norm"] = "each"
    if "layers" not in traits:
        usual["layers"] = layers(c)
    flagged = [where for flag, where in BIASES.items() if getattr(c, flag, False)]
    traits["biases"] = frozenset().union(traits.get("biases", ()), *flagged)
    return Description(**usual | said | traits)


def head_dim(c: Any) -> int:
    """Return the dimension of a head."""
    given, width, heads = getattr(c, "head_dim", None), c.hidden_size, c.num_attention_heads
    if given is None:
        check_multiple("hidden_size", width, "num_attention_heads", heads)
    return given or width // heads


def turning(c: Any, full: bool) -> rotary.Rotary:
    """Return the rotation of layers with full attention, or of those with a window."""
    settings, kind = c.rope_parameters, "full_attention" if full else "sliding_attention"
    settings = settings if "rope_type" in settings else settings.get(kind)
    if settings is None:
        raise ValueError(f"rope_parameters must have settings for {kind}, but has {', '.join(c.rope_parameters)}.")
    size = head_dim(c)
    if size % 2 and settings.get("partial_rotary_factor", 1) == 1:
        raise ValueError(f"the heads' dimension must be even for rotary positions, but is {size}.")
    return rotary.rotary(settings, size, max_length=c.max_position_embeddings)


def layers(c: Any, full: Sequence[bool] | None = None, turns: Sequence[bool] | None = None) -> tuple[Layer, ...]:
    """Return the layers: `full` tells which have no window (see `is_full`), `turns` which have rotary positions.

    By default all layers of a family with rotary positions have them.
    """
    full, window = is_full(c, full), getattr(c, "sliding_window", None)
    turns = [hasattr(c, "rope_parameters") and not getattr(c, "alibi", False)] * len(full) if turns is None else turns
    return tuple(
        Layer(turning(c, whole) if turn else None, None if whole else window)
        for whole, turn in zip(full, turns, strict=True)
    )


def is_full(c: Any, full: Sequence[bool] | None = None) -> Sequence[bool]:
    """Return True for each layer with full attention, False for one with a window.

    `layer_types` tells, else `full`; by default the layers from `max_window_layers` on have the window if there is one.
    """
    count = c.num_hidden_layers
    if (given := getattr(c, "layer_types", None)) is not None:
        check_kinds("layer_types", given, count, "full_attention", "sliding_attention")
        return [kind == "full_attention" for kind in given]
    if not getattr(c, "use_sliding_window", True):
        return [True] * count
    first = getattr(c, "max_window_layers", 0) if getattr(c, "sliding_window", None) else count
    return [i < first for i in range(count)] if full is None else full


def check_kinds(name: str, given: Sequence[str], count: int, *known: str) -> None:
    """Raise ValueError unless each layer is given a known kind."""
    if len(given) != count or not set(given) <= set(known):
        raise ValueError(f"{name} must be {' or '.join(known)} for each of {count} layers, but is {list(given)}.")


def every(c: Any, period: int) -> list[bool]:
    """Return True for every `period`-th layer."""
    return [(i + 1) % period == 0 for i in range(c.num_hidden_layers)]


# Traits of families, of a configuration -------------------------------------------------------------------------------


def gemma(c: Any) -> Traits:
    """Return the traits of Gemma (Gemma Team 2024): scales are 1 + w, and embeddings are multiplied by √width."""
    traits = {"norm": Norm(offset=1.0), "embedding_scale": math.sqrt(c.hidden_size)}
    if c.get("hidden_act") == "gelu":  # in old files of Gemma 1, which mean the other form
        traits["activation"] = "gelu_pytorch_tanh"
    return traits


def gemma2(c: Any, period: int = 2) -> Traits:
    """Return the traits of Gemma 2: four norms, capped scores and logits, a window in every other layer."""
    own = {"norms": FOUR_NORMS, "score_scale": c.query_pre_attn_scalar**-0.5, "layers": layers(c, every(c, period))}
    return gemma(c) | own


def gemma3(c: Any) -> Traits:
    """Return the traits of Gemma 3: a window in five of six layers, norms of queries and keys."""
    return gemma2(c, c.sliding_window_pattern) | {"head_norm": "head"}


def olmo3(c: Any) -> Traits:
    """Return the traits of OLMo 3: a window in three of four layers, norms after attention and MLP."""
    return {"layers": layers(c, every(c, 4)), "norms": NORMS_AFTER, "head_norm": "all"}


def smollm3(c: Any) -> Traits:
    """Return the traits of SmolLM3: no rotary positions in every fourth layer."""
    count, turns = c.num_hidden_layers, [not each for each in every(c, c.no_rope_layer_interval)]
    turns = turns if c.no_rope_layers is None else c.no_rope_layers[:count]
    if len(turns) != count:
        raise ValueError(f"no_rope_layers must have {count} values, but has {len(turns)}.")
    return {"layers": layers(c, turns, turns)}


def qwen3_moe(c: Any) -> Traits:
    """Return the traits of Qwen 3 with experts in every `decoder_sparse_step`-th layer."""
    sparse = [each and i not in c.mlp_only_layers for i, each in enumerate(every(c, c.decoder_sparse_step))]
    parts = tuple(layer._replace(dense=not each) for layer, each in zip(layers(c), sparse, strict=True))
    return {"layers": parts, "head_norm": "head"}


def stablelm(c: Any) -> Traits:
    """Return the traits of StableLM (Bellagente et al. 2024): LayerNorms, one where the block is parallel."""
    return {"norm": LAYER_NORM, "norms": ONE_NORM if c.use_parallel_residual else Norms()}


def cohere2(c: Any) -> Traits:
    """Return the traits of Command R7B: rotary positions in the layers with a window alone."""
    full = is_full(c, every(c, c.sliding_window_pattern))
    return COMMAND_R | {"layers": layers(c, full, [not each for each in full])}


def gptj(c: Any) -> Traits:
    """Return the traits of GPT-J (Wang and Komatsuzaki 2021): parallel with one norm, interleaved rotary pairs."""
    if c.rotary_dim % 2 or c.rotary_dim > head_dim(c):
        raise ValueError(f"rotary_dim must be even and at most the heads' {head_dim(c)}, but is {c.rotary_dim}.")
    turn = rotary.rotary({"rope_theta": 1e4}, c.rotary_dim, max_length=c.max_position_embeddings)
    own = {"layers": (Layer(turn),) * c.num_hidden_layers, "interleaved": True, "biases": MLP | {"head"}}
    return PLAIN | own | {"norms": Norms("ln_1", mlp_in=None), "parallel": True}


def gpt_neo(c: Any) -> Traits:
    """Return the traits of GPT-Neo (Black et al. 2021): scores are not scaled, and every other layer has a window."""
    kinds = c.attention_layers
    if kinds is None:
        kinds = [kind for pattern, times in c.attention_types for kind in tuple(pattern) * times]
    check_kinds("attention_layers", kinds, c.num_hidden_layers, "global", "local")
    windows = tuple(Layer(window=c.window_size if kind == "local" else None) for kind in kinds)
    own = {"layers": windows, "learned_positions": 0, "score_scale": 1.0, "biases": MLP | {"o"}}
    return PLAIN | own | {"norms": Norms("ln_1", mlp_in="ln_2")}


def opt(c: Any) -> Traits:
    """Return the traits of OPT (Zhang et al. 2022): learned positions from row 2 of their table on."""
    norm = Norm("layer", scale=c.layer_norm_elementwise_affine, bias=c.layer_norm_elementwise_affine)
    norms = Norms("self_attn_layer_norm", mlp_in="final_layer_norm")
    return {"norm": norm, "norms": norms, "gate": None, "learned_positions": 2}


def falcon(c: Any) -> Traits:
    """Return the traits of Falcon (Almazrouei et al. 2023): one key head for all (7B), or for each group (40B)."""
    heads, new, parallel = c.num_attention_heads, c.new_decoder_architecture, c.parallel_attn
    keys = (c.num_kv_heads or heads) if new else 1 if c.multi_query else heads
    two = new and c.num_ln_in_parallel_attn in (None, 2)
    norms = Norms("ln_attn", mlp_in="ln_mlp") if two else ONE_NORM if new or parallel else Norms()
    own = {"kv_heads": keys, "fused": "groups", "norms": norms, "parallel": new or parallel}
    return PLAIN | own | {"alibi": head_dim(c) ** -0.5 if c.alibi else None}


# Fields of families, with the defaults of the format ------------------------------------------------------------------

SIZES = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), int)
BASE = SIZES | {"initializer_range": 0.02, "tie_word_embeddings": True}
LAYER = {"layer_norm_eps": 1e-5}
GPT = BASE | LAYER | {"intermediate_size": Maybe(int), "max_position_embeddings": 2048, "hidden_act": "gelu_new"}
ROTARY = BASE | {"max_position_embeddings": 2048, "rope_parameters": {}, "intermediate_size": int, "hidden_act": "silu"}
UNTIED = ROTARY | {"tie_word_embeddings": False}


def llama(length: int, kv_heads: int | None = None, **others: Any) -> dict[str, Any]:
    """Return the fields of most families, with the context length, key-value heads (as many as heads) and others."""
    heads = {"num_key_value_heads": Maybe(int, kv_heads), "head_dim": Maybe(int)}
    return UNTIED | heads | {"max_position_embeddings": length} | others


RMS = {"rms_norm_eps": 1e-6, "attention_bias": False}
UNTIED_QUARTER = UNTIED | LAYER | {"rope_parameters": {"partial_rotary_factor": 0.25}}
WINDOW = {"sliding_window": Maybe(int, 4096), "layer_types": Maybe(tuple)}
QWEN = WINDOW | {"use_sliding_window": False, "max_window_layers": Count(28)}
GEMMA = RMS | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256}
GEMMA |= {"use_bidirectional_attention": Only(False)}
GEMMA2 = GEMMA | WINDOW | {"query_pre_attn_scalar": 256}
CAPS = {"final_logit_softcapping": Maybe(float, 30.0), "attn_logit_softcapping": Maybe(float, 50.0)}
COHERE = LAYER | {"attention_bias": False, "logit_scale": 0.0625, "tie_word_embeddings": True}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
GRANITE = RMS | {"mlp_bias": False} | dict.fromkeys(MULTIPLIERS, 1.0)
EXPERTS = {"num_experts_per_tok": 8, "num_experts": 128, "norm_topk_prob": False}
OLMO = llama(2048, attention_bias=False, clip_qkv=Maybe(float))
OLMO2 = llama(2048, **RMS | {"rms_norm_eps": 1e-5})
OLMO3 = OLMO2 | WINDOW | {"rope_parameters": {"rope_theta": 5e5, "rope_local_base_freq": None}}
OLMOE = OLMO2 | EXPERTS | {"max_position_embeddings": 4096, "num_experts": 64, "clip_qkv": Maybe(float)}
GEMMA3 = llama(131072, 4, **GEMMA2, rope_parameters={"rope_theta": 1e6, "rope_local_base_freq": 1e4})
GEMMA3 |= {"sliding_window_pattern": 6, "final_logit_softcapping": Maybe(float), "attn_logit_softcapping": Only(None)}
QWEN3_MOE = llama(32768, 4, **RMS, **EXPERTS, sliding_window=Maybe(int, 4096), use_sliding_window=False)
QWEN3_MOE |= {"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": ()}
SMOLLM3 = llama(32768, 4, **RMS, **WINDOW | {"sliding_window": Maybe(int)}, rope_parameters={"rope_theta": 2e6})
SMOLLM3 |= {"mlp_bias": False, "use_sliding_window": False, "tie_word_embeddings": True}
SMOLLM3 |= {"no_rope_layers": Maybe(tuple), "no_rope_layer_interval": 4}
PHI = llama(2048, **LAYER, hidden_act="gelu_new", qk_layernorm=Only(False))
PHI |= {"rope_parameters": {"partial_rotary_factor": 0.5}}
PHI3 = llama(4096, rms_norm_eps=1e-5, sliding_window=Maybe(int), original_max_position_embeddings=4096)
PHI3 |= {"rope_parameters": {"partial_rotary_factor": 1.0, "older_types": {"yarn": "longrope"}}}
MIXTRAL = llama(131072, 8, rms_norm_eps=1e-5, sliding_window=Maybe(int), rope_parameters={"rope_theta": 1e6})
MIXTRAL |= {"num_experts_per_tok": 2, "num_experts": 8}
STABLELM = UNTIED_QUARTER | {"num_key_value_heads": Maybe(int), "max_position_embeddings": 4096}
STABLELM |= dict.fromkeys(("use_qkv_bias", "qk_layernorm", "use_parallel_residual"), False)
OPT = BASE | {"intermediate_size": int, "max_position_embeddings": 2048, "hidden_act": "relu"}
OPT |= {"enable_bias": True, "layer_norm_elementwise_affine": True}
OPT |= {"do_layer_norm_before": Only(True), "_remove_final_layer_norm": Only(False)}
FALCON = ROTARY | LAYER | {"hidden_act": "gelu", "multi_query": True, "parallel_attn": True}
FALCON |= dict.fromkeys(("intermediate_size", "num_kv_heads", "num_ln_in_parallel_attn"), Maybe(int))
FALCON |= dict.fromkeys(("alibi", "new_decoder_architecture", "bias"), False)
T5_FIELDS = {"head_dim": int, "intermediate_size": int} | SIZES
T5_FIELDS |= {"is_encoder_decoder": Only(True), "is_decoder": Only(False)}

# Names of modules and fields ------------------------------------------------------------------------------------------

LARGER = "mlp.up_proj mlp.dense_h_to_4h, mlp.down_proj mlp.dense_4h_to_h"  # the MLP's names in three families
BLOCK = (  # BLOOM's and Falcon's
    f"{LARGER}, model transformer, layers h, norm ln_f, embed_tokens word_embeddings, "
    "embed_norm word_embeddings_layernorm, self_attn.qkv_proj self_attention.query_key_value, "
    "self_attn.o_proj self_attention.dense, layer_norm_eps layer_norm_epsilon"
)
GPT_NAMES = "model transformer, layers h, norm ln_f, embed_tokens wte, embed_positions wpe"
GPT_FIELDS = (
    "hidden_size n_embd, intermediate_size n_inner, num_hidden_layers n_layer, num_attention_heads n_head, "
    "max_position_embeddings n_positions, hidden_act activation_function, layer_norm_eps layer_norm_epsilon"
)


# Rows -----------------------------------------------------------------------------------------------------------------


def t5(name: str, **defaults: Any) -> Family:
    """Return the row of T5 or of its kin, with what differs in the defaults of the format."""
    return Family(
        name,
        T5_FIELDS | defaults,
        model=T5,
        config=T5Config,
        names="embed_tokens shared, hidden_size d_model, head_dim d_kv, intermediate_size d_ff, "
        "num_hidden_layers num_layers, num_attention_heads num_heads",
        buffers=re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        targets=("q", "v"),
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "GPT2",
        SIZES | {"add_cross_attention": Only(False)},
        model=GPT2,
        config=GPT2Config,
        names=f"{GPT_NAMES}, {GPT_FIELDS}",
        transposed=False,
        targets=("c_attn",),
    ),
    "llama": Family("Llama", llama(2048, **RMS, mlp_bias=False)),
    "mistral": Family("Mistral", llama(131072, 8, rms_norm_eps=1e-6, **WINDOW)),
    "qwen2": Family("Qwen2", llama(32768, 32, rms_norm_eps=1e-6, **QWEN), {"biases": QKV}),
    "qwen3": Family("Qwen3", llama(32768, 32, **RMS, **QWEN, head_dim=128), {"head_norm": "head"}),
    "gemma": Family("Gemma", llama(8192, 16, **GEMMA), gemma),
    "gemma2": Family("Gemma2", llama(8192, 4, **GEMMA2, **CAPS), gemma2, names="hidden_act hidden_activation"),
    "gemma3_text": Family("Gemma3", GEMMA3, gemma3, names="hidden_act hidden_activation"),
    "olmo": Family("Olmo", OLMO, {"norm": Norm("layer", scale=False)}),
    "olmo2": Family("Olmo2", OLMO2, {"norms": NORMS_AFTER, "head_norm": "all"}),
    "olmo3": Family("Olmo3", OLMO3, olmo3),
    "smollm3": Family("SmolLM3", SMOLLM3, smollm3),
    "phi": Family(
        "Phi",
        PHI,
        PLAIN | {"norms": ONE_NORM, "parallel": True, "biases": EVERYWHERE | {"head"}},
        names="norm final_layernorm, self_attn.o_proj self_attn.dense, mlp.up_proj mlp.fc1, mlp.down_proj mlp.fc2",
    ),
    "phi3": Family("Phi3", PHI3, {"fused": "blocks", "gate": "fused"}, targets=("qkv_proj",)),
    "gpt_neox": Family(
        "GPTNeoX",
        UNTIED_QUARTER | {"attention_bias": True, "use_parallel_residual": True, "hidden_act": "gelu"},
        PLAIN | {"fused": "groups", "biases": MLP},
        names=f"{LARGER}, model gpt_neox, embed_tokens embed_in, norm final_layer_norm, lm_head embed_out, "
        "self_attn.qkv_proj attention.query_key_value, self_attn.o_proj attention.dense",
        spellings="rotary_emb_base rope_theta, rotary_pct partial_rotary_factor",
        copies=("embed_out.weight",),
        targets=("query_key_value",),
    ),
    "stablelm": Family(
        "StableLm",
        STABLELM,
        stablelm,
        names="self_attn.q_norm self_attn.q_layernorm.norms.{}, self_attn.k_norm self_attn.k_layernorm.norms.{}",
    ),
    "gpt_neo": Family(
        "GPTNeo",
        GPT | {"window_size": 256, "attention_layers": Maybe(tuple), "attention_types": ((("global", "local"), 12),)},
        gpt_neo,
        names=f"{GPT_NAMES}, self_attn attn.attention, self_attn.o_proj attn.attention.out_proj, mlp.up_proj mlp.c_fc, "
        "mlp.down_proj mlp.c_proj, num_hidden_layers num_layers, num_attention_heads num_heads, "
        "hidden_act activation_function, layer_norm_eps layer_norm_epsilon",
    ),
    "gptj": Family(
        "GPTJ",
        GPT | {"rotary_dim": 64, "tie_word_embeddings": False},
        gptj,
        names=f"{GPT_NAMES}, {GPT_FIELDS}, self_attn attn, self_attn.o_proj attn.out_proj, mlp.up_proj mlp.fc_in, "
        "mlp.down_proj mlp.fc_out",
    ),
    "opt": Family(
        "OPT",
        OPT,
        opt,
        names="model model.decoder, norm final_layer_norm, self_attn.o_proj self_attn.out_proj, mlp.up_proj fc1, "
        "mlp.down_proj fc2, intermediate_size ffn_dim, hidden_act activation_function, initializer_range init_std",
    ),
    "falcon": Family(
        "Falcon",
        FALCON,
        falcon,
        names=f"{BLOCK}, intermediate_size ffn_hidden_size, hidden_act activation",
        spellings="n_embed hidden_size",
        targets=("query_key_value",),
    ),
    "bloom": Family(
        "Bloom",
        BASE | LAYER | {"apply_residual_connection_post_layernorm": Only(False)},
        PLAIN | ALIBI | {"embedding_norm": True, "fused": "groups", "activation": "gelu_new", "biases": EVERYWHERE},
        names=f"{BLOCK}, num_hidden_layers n_layer, num_attention_heads n_head",
        spellings="n_embed hidden_size, num_hidden_layers n_layer, num_attention_heads n_head",
        targets=("query_key_value",),
    ),
    "cohere": Family(
        "Cohere", llama(8192, **COHERE, use_qk_norm=False, rope_parameters={"rope_theta": 5e5}), COMMAND_R
    ),
    "cohere2": Family("Cohere2", llama(8192, **COHERE, **WINDOW, sliding_window_pattern=4), cohere2),
    "granite": Family("Granite", llama(2048, **GRANITE), lambda c: {"logit_scale": 1 / c.logits_scaling}),
    "mixtral": Family(
        "Mixtral",
        MIXTRAL,
        names="num_experts num_local_experts, mlp.gate block_sparse_moe.gate, "
        "mlp.experts.gate_proj block_sparse_moe.experts.{}.w1, mlp.experts.up_proj block_sparse_moe.experts.{}.w3, "
        "mlp.experts.down_proj block_sparse_moe.experts.{}.w2",
    ),
    "olmoe": Family("Olmoe", OLMOE, {"head_norm": "all"}, spellings="num_local_experts num_experts"),
    "qwen3_moe": Family("Qwen3Moe", QWEN3_MOE, qwen3_moe, spellings="num_local_experts num_experts"),
    "t5": t5("T5"),
    "mt5": t5("MT5", feed_forward_proj="gated-gelu", decoder_start_token_id=0),
    "umt5": t5("UMT5", feed_forward_proj="gated-gelu", decoder_start_token_id=0),
}

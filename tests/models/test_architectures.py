"""GPT-2, Llama and StableLM as functions: sizes, initial parameters, and what may and may not change their logits."""

import copy
import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import Config, Llama, LlamaConfig, StableLM, StableLMConfig, rotary
from jaxrl_llm.models.gpt2 import ACTIVATIONS, GPT2, GPT2Config

VOCAB, CONTEXT = 29, 16
GPT2_SIZES = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 100.0,
}
STABLELM_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT,
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.7,  # 4 of 6 coordinates
}
STABLELM_OPTIONS = {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}
MODELS = {
    "gpt2": GPT2(GPT2Config(**GPT2_SIZES)),
    "llama": Llama(LlamaConfig(**LLAMA_SIZES, attention_bias=True, mlp_bias=True)),
    "stablelm": StableLM(StableLMConfig(**STABLELM_SIZES)),
    "stablelm-options": StableLM(StableLMConfig(**STABLELM_SIZES, **STABLELM_OPTIONS, tie_word_embeddings=True)),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 10))


def random_params(lm, dtype=jnp.float32, seed=0):
    """Every parameter random, biases and norms too, and logits far from uniform."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        return jnp.asarray(1 + 0.2 * noise if path[-1].key == "scale" else 0.4 * noise, dtype)

    return jax.tree_util.tree_map_with_path(draw, lm.abstract_params)


@functools.partial(jax.jit, static_argnums=0)
def apply(lm, params, tokens, mask=None):
    return lm.apply(params, tokens, mask=mask)[0]


def logits_of(lm, params, tokens, mask=None):
    return np.asarray(apply(lm, params, jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)))


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param], random_params(MODELS[request.param])


# Sizes and initial parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lm", "count"),
    [
        (GPT2(), 124_439_808),  # GPT-2 small, as published; then medium
        (GPT2(GPT2Config(n_embd=1024, n_layer=24, n_head=16)), 354_823_168),
        (GPT2(GPT2Config(tie_word_embeddings=False)), 124_439_808 + 50257 * 768),
        (Llama(LlamaConfig()), 134_515_008),  # SmolLM2-135M; then TinyLlama-1.1B
        (
            Llama(
                LlamaConfig(
                    vocab_size=32000,
                    hidden_size=2048,
                    intermediate_size=5632,
                    num_hidden_layers=22,
                    num_attention_heads=32,
                    num_key_value_heads=4,
                    tie_word_embeddings=False,
                )
            ),
            1_100_048_384,
        ),
        (StableLM(StableLMConfig()), 2_795_443_200),  # StableLM-Zephyr-3B
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-untied", "smollm2-135m", "tinyllama-1.1b", "stablelm-zephyr-3b"],
)
def test_the_number_of_parameters_is_the_published_one(lm, count):
    assert lm.num_params() == count
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(lm.abstract_params)), "shapes alone"


def named_leaves(params):
    return {
        ".".join(str(entry.key) for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


INITIAL = {
    "gpt2": GPT2(
        GPT2Config(vocab_size=300, n_positions=200, n_embd=64, n_layer=3, n_head=2, tie_word_embeddings=False)
    ),
    "llama": Llama(
        LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            attention_bias=True,
            mlp_bias=True,
            initializer_range=0.05,
        )
    ),
    "stablelm": StableLM(
        StableLMConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            use_qkv_bias=True,
            qk_layernorm=True,
            initializer_range=0.05,
        )
    ),
}


@functools.cache
def initial(name, seed=0):
    leaves = named_leaves(jitted_init(INITIAL[name], jax.random.key(seed)))
    return {each: np.asarray(leaf, np.float64) for each, leaf in leaves.items()}


@functools.partial(jax.jit, static_argnums=0)
def jitted_init(lm, key):
    return lm.init(key)


def assert_std(name, leaf, std):
    """Within five standard errors of a normal distribution's standard deviation and mean."""
    assert leaf.std() == pytest.approx(std, rel=5 / math.sqrt(2 * leaf.size)), name
    assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size), name


def test_gpt2_starts_as_published():
    """N(0, 0.02²), positions with half of it, what is added to the residual stream with 0.02 / √(2 n_layer)."""
    leaves = initial("gpt2")
    for name, leaf in leaves.items():
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, 1 if name.endswith("scale") else 0, err_msg=name)
        else:
            std = 0.02 / math.sqrt(2 * 3) if "c_proj" in name else 0.02
            assert_std(name, leaf, 0.01 if name == "wpe.embedding" else std)
    assert len(leaves) == 2 + 3 * 12 + 2 + 1


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 1 + 2 * (2 + 7 * 2) + 1), ("stablelm", 1 + 2 * (4 + 7 + 3 + 2) + 2 + 1)]
)
def test_llama_and_stablelm_start_as_published(name, count):
    leaves = initial(name)
    for name, leaf in leaves.items():
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, 1 if name.endswith("scale") else 0, err_msg=name)
        else:
            assert_std(name, leaf, 0.05)
    assert len(leaves) == count


@pytest.mark.parametrize("name", INITIAL)
def test_every_initial_matrix_is_drawn_anew_and_follows_from_the_key(name):
    first, again = initial(name), initial.__wrapped__(name)
    matrices = [each for each in first if each.endswith(("kernel", "embedding"))]
    for each in matrices:
        np.testing.assert_array_equal(first[each], again[each])
    starts = np.stack([first[each].ravel()[:4096] for each in matrices])
    assert len(starts) > 10
    assert np.abs(np.corrcoef(starts) - np.eye(len(starts))).max() < 0.1, "two matrices were drawn from one key"
    other = initial(name, seed=1)
    assert np.abs([np.corrcoef(first[each].ravel(), other[each].ravel())[0, 1] for each in matrices]).max() < 0.1


@pytest.mark.parametrize("name", INITIAL)
def test_parameters_are_a_plain_nested_dict_of_arrays(name):
    def check(node):
        if isinstance(node, dict):
            assert type(node) is dict and node
            for key, child in node.items():
                assert type(key) in (str, int)
                check(child)
        else:
            assert type(node) is type(jnp.zeros(1))

    lm = INITIAL[name]
    params = jitted_init(lm, jax.random.key(0))
    check(params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), lm.abstract_params)


# Configurations -------------------------------------------------------------------------------------------------------


SMALL = {
    **{"vocab_size": 29, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def scaled(**settings):
    """A Llama with these rotary settings."""
    return LlamaConfig(rope_scaling=settings)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GPT2Config(n_embd=10, n_head=3), "n_embd must be a multiple of n_head, but they are 10 and 3"),
        (lambda: GPT2Config(n_layer=0), "n_layer must be a positive integer, but is 0"),
        (lambda: GPT2Config(n_inner=-1), "n_inner must be a positive integer, but is -1"),
        (lambda: GPT2Config(activation_function="tanh"), "activation_function must be one of gelu_new,"),
        (lambda: GPT2Config(layer_norm_epsilon=math.nan), "layer_norm_epsilon must be a finite number"),
        (lambda: GPT2Config(tie_word_embeddings=1), "tie_word_embeddings must be true or false, but is 1"),
        (lambda: LlamaConfig(num_attention_heads=9, num_key_value_heads=4), "they are 9 and 4"),
        (lambda: LlamaConfig(hidden_size=577), "hidden_size must be a multiple of num_attention_heads"),
        (lambda: LlamaConfig(head_dim=9), "must be even for rotary positions, but is 9"),
        (lambda: LlamaConfig(rope_theta=0.0), "rope_theta must be above 0"),
        (lambda: LlamaConfig(rms_norm_eps=-1e-6), "rms_norm_eps must be a finite number, 0 or above, but is -1e-06"),
        (lambda: StableLMConfig(num_key_value_heads=12), "they are 32 and 12"),
        (lambda: StableLMConfig(hidden_size=2561), "hidden_size must be a multiple of num_attention_heads"),
        (
            lambda: StableLMConfig(partial_rotary_factor=0.6, hidden_size=160),
            "a head's 5 coordinates to turn, 2 or more",
        ),
        (lambda: StableLMConfig(partial_rotary_factor=0.0), "2 or more, but is 0.0"),
        (lambda: StableLMConfig(partial_rotary_factor=1.5), "2 or more, but is 1.5"),
        (lambda: StableLMConfig(partial_rotary_factor=0.15, hidden_size=640), "20 coordinates to turn, 2 or more, but"),
        (lambda: StableLMConfig(layer_norm_eps=math.inf), "layer_norm_eps must be a finite number"),
        (lambda: StableLMConfig(qk_layernorm=1), "qk_layernorm must be true or false, but is 1"),
        (lambda: scaled(rope_type="dynamic"), "rope_type must be one of default, linear, llama3, yarn, longrope, but"),
        (lambda: scaled(rope_type="llama3", factor=8.0), "needs low_freq_factor and high_freq_factor"),
        (lambda: scaled(rope_type="linear", factor=0.0), "factor must be above 0"),
        (lambda: scaled(rope_type="linear"), "rope_type linear needs factor"),
        (
            lambda: scaled(
                **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
                original_max_position_embeddings=16,
            ),
            "low_freq_factor must be below high_freq_factor, but they are 4.0 and 4.0",
        ),
        (
            lambda: scaled(
                rope_type="longrope", short_factor=[1.0], long_factor=[1.0], original_max_position_embeddings=16
            ),
            "short_factor must be 32 numbers",
        ),
        (lambda: LlamaConfig(width=3), "llama has no field width"),
        (lambda: Config("lama", width=3), "model_type must be one of gpt2, llama, .*, but is 'lama'"),
        (lambda: Config("opt", **SMALL, rope_theta=5.0), "no field intermediate_size, num_key_value_heads, rope_theta"),
        *(
            (
                lambda name=name, types=types: Config(name, **SMALL, layer_types=types),
                "full_attention or sliding_attention for each",
            )
            for name in ("qwen2", "qwen3")
            for types in (["full_attention"] * 3, ["full"] * 4)
        ),
        (lambda: LlamaConfig(vocab_size=None), "vocab_size must be a positive integer, but is None"),
    ],
)
def test_a_configuration_that_cannot_be_is_an_error(make, said):
    with pytest.raises(ValueError, match=said):
        make()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def windows(description):
    """The window of each layer."""
    return [layer.window for layer in description.layers]


@pytest.mark.parametrize(
    ("model_type", "fields", "found", "expected"),
    [
        ("cohere2", {"sliding_window_pattern": 2, "sliding_window": 5}, windows, [5, None, 5, None]),
        ("cohere2", {"sliding_window": 5}, windows, [5, 5, 5, None]),
        ("mistral", {"sliding_window": 5}, windows, [5] * 4),
        ("mistral", {"sliding_window": 5, "layer_types": ["full_attention"] * 4}, windows, [None] * 4),
        (
            "smollm3",
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5},
            windows,
            [5, None, 5, None],
        ),
        (
            "smollm3",
            {"no_rope_layers": [0, 1, 1, 1, 0]},
            lambda d: [bool(each.rotary) for each in d.layers][:2],
            [0, 1],
        ),
        ("gemma2", {"hidden_activation": "gelu"}, lambda d: d.activation, "gelu"),
        ("gemma", {"hidden_act": "gelu"}, lambda d: d.activation, "gelu_pytorch_tanh"),
        (
            "llama",
            {"rope_scaling": YARN, "original_max_position_embeddings": 32},
            lambda d: d.layers,
            Config("llama", **SMALL, rope_scaling=YARN | {"original_max_position_embeddings": 32}).description.layers,
        ),
        (
            "gpt_neox",
            {"rope_theta": 5.0, "rotary_emb_base": 77.0, "rotary_pct": 1},
            lambda d: d.layers[0].rotary,
            None,
        ),
    ],
)
def test_fields_that_change_the_function_are_heeded(model_type, fields, found, expected):
    sizes = {name: value for name, value in SMALL.items() if model_type != "gpt_neox" or "key_value" not in name}
    description = Config(model_type, **sizes, **fields).description
    if expected is None:
        expected = rotary.rotary({"rope_theta": 77.0}, 4, max_length=1)
    assert found(description) == expected


LONGROPE = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "settings", "meant"),
    [
        # What transformers takes where a file does not say it:
        ("llama", {"rope_type": "yarn", "factor": 4.0}, YARN | {"original_max_position_embeddings": 64}),
        ("llama", LLAMA3, LLAMA3 | {"original_max_position_embeddings": 64}),
        (
            "llama",
            {"rope_type": "longrope"} | LONGROPE,
            {"rope_type": "longrope", "original_max_position_embeddings": 64} | LONGROPE,
        ),
        ("phi3", {"type": "yarn"} | LONGROPE, {"rope_type": "longrope"} | LONGROPE),
        (
            "gemma3_text",
            {"full_attention": {"rope_type": "linear", "factor": 8.0}},
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        *(
            (name, {"rope_theta": 7.0, "full_attention": {"rope_theta": 5.0}}, {"full_attention": {"rope_theta": 5.0}})
            for name in ("llama", "olmo3")  # what stands beside the kinds of layers has no effect
        ),
        (
            "gemma3_text",
            {"sliding_attention": {"rope_type": "default"}},
            {
                "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    ],
)
def test_rotary_settings_that_a_file_leaves_out(model_type, settings, meant):
    found, expected = (
        Config(model_type, **SMALL, max_position_embeddings=64, rope_parameters=each) for each in (settings, meant)
    )
    assert found == expected and found.description == expected.description


def test_phi3_knows_no_yarn():
    with pytest.raises(ValueError, match="rope_type longrope needs short_factor and long_factor"):
        Config("phi3", **SMALL, rope_parameters={"rope_type": "yarn", "factor": 4.0})


@pytest.mark.parametrize(
    "model_type", ["cohere", "cohere2", "granite", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "smollm3"]
)
def test_heads_are_of_the_size_that_is_said(model_type):
    assert Config(model_type, **SMALL, head_dim=8).description.head_dim == 8
    assert Config(model_type, **SMALL).description.head_dim == 4


def test_a_configuration_hashes_and_comes_back_from_plain_json():
    config = Config("qwen3_moe", **SMALL, num_experts=np.int64(9), rope_theta=np.float32(10000))
    same = Config("qwen3_moe", **SMALL, num_experts=9, rope_theta=10000)
    assert config == same and hash(config) == hash(same)
    assert copy.deepcopy(config) == config and Config("qwen3_moe", **config.to_dict()) == config
    assert config.replace(num_experts=8) != config
    with pytest.raises(ValueError, match="10 experts for each token must be at most 9"):
        config.replace(num_experts_per_tok=10)
    with pytest.raises(AttributeError, match="frozen"):
        config.hidden_size = 3
    with pytest.raises(TypeError, match="does not support item assignment"):
        config.rope_parameters["rope_theta"] = 3.0
    assert pickle.loads(pickle.dumps(config)) == config and eval(repr(config)) == config


def test_numbers_of_numpy_are_numbers():
    sizes = {"vocab_size": np.int64(5), "n_embd": np.int32(8), "n_head": np.int64(2), "n_layer": np.int8(1)}
    config = GPT2Config(**sizes, layer_norm_epsilon=np.float32(1))
    assert GPT2(config).num_params() == GPT2(GPT2Config(vocab_size=5, n_embd=8, n_head=2, n_layer=1)).num_params()


def test_models_are_equal_and_hash_by_their_configuration():
    assert GPT2(GPT2Config(**GPT2_SIZES)) == MODELS["gpt2"] and hash(GPT2(GPT2Config(**GPT2_SIZES))) == hash(
        MODELS["gpt2"]
    )
    assert GPT2(GPT2Config(**GPT2_SIZES | {"n_head": 2})) != MODELS["gpt2"]
    scaled = [
        Llama(LlamaConfig(**LLAMA_SIZES, rope_scaling={"rope_type": "linear", "factor": factor}))
        for factor in (2.0, 2.0, 4.0)
    ]
    assert scaled[0] == scaled[1] != scaled[2] and len(set(scaled)) == 2
    assert MODELS["gpt2"] != MODELS["llama"]


def test_an_equal_model_compiles_nothing_anew():
    lm, params = MODELS["gpt2"], random_params(MODELS["gpt2"])
    with jax.enable_x64(True):  # as the programs that the definitions are compared with
        logits_of(lm, params, TOKENS)
        compiled = apply._cache_size()
        logits_of(GPT2(GPT2Config(**GPT2_SIZES)), params, TOKENS)
        assert apply._cache_size() == compiled


X = np.linspace(-6, 6, 101)
DEFINITIONS = {
    "gelu_new": 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))),
    "gelu_pytorch_tanh": 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3))),
    "gelu": 0.5 * X * (1 + np.vectorize(math.erf)(X / math.sqrt(2))),
    "relu": np.maximum(X, 0),
    "silu": X / (1 + np.exp(-X)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_their_names_mean(name):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(X, jnp.float32)), DEFINITIONS[name], rtol=0, atol=2e-6)


# The functions, against their definitions in numpy, in float64 --------------------------------------------------------


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attention(query, key, value, scale):
    """One row, [head, time, head_dim]; each query sees itself and what stands before."""
    time = query.shape[1]
    scores = np.where(np.tri(time, dtype=bool), query @ key.swapaxes(1, 2) * scale, -np.inf)
    return (softmax(scores) @ value).swapaxes(0, 1).reshape(time, -1)


def linear(params, x):
    return x @ params["kernel"] + params.get("bias", 0)


def gpt2_by_definition(config, params, tokens):
    def norm(params, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = x.var(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + config.layer_norm_epsilon) * params["scale"] + params["bias"]

    x = params["wte"]["embedding"][tokens] + params["wpe"]["embedding"][: len(tokens)]
    for layer in range(config.n_layer):
        block = params["h"][layer]
        qkv = np.split(linear(block["attn"]["c_attn"], norm(block["ln_1"], x)), 3, axis=-1)
        query, key, value = (part.reshape(len(tokens), config.n_head, -1).swapaxes(0, 1) for part in qkv)
        x = x + linear(block["attn"]["c_proj"], attention(query, key, value, query.shape[-1] ** -0.5))
        inner = linear(block["mlp"]["c_fc"], norm(block["ln_2"], x))
        inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + linear(block["mlp"]["c_proj"], inner)
    return norm(params["ln_f"], x) @ params["wte"]["embedding"].T


def llama_by_definition(config, params, tokens):
    half, time = config.description.head_dim // 2, len(tokens)

    def norm(params, x):
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * params["scale"]

    def rotate(x):
        """As complex numbers: coordinates i and i + half turn together."""
        turn = np.exp(1j * np.arange(time)[:, None] * config.rope_parameters["rope_theta"] ** (-np.arange(half) / half))
        z = (x[..., :half] + 1j * x[..., half:]) * turn
        return np.concatenate([z.real, z.imag], axis=-1)

    def heads(params, x, repeat):
        split = linear(params, x).reshape(time, -1, config.description.head_dim).swapaxes(0, 1)
        return np.repeat(split, repeat, axis=0)

    group = config.num_attention_heads // config.num_key_value_heads
    x = params["embed_tokens"]["embedding"][tokens]
    for layer in range(config.num_hidden_layers):
        block = params["layers"][layer]
        attn, mlp, y = block["self_attn"], block["mlp"], norm(block["input_layernorm"], x)
        query, key = rotate(heads(attn["q_proj"], y, 1)), rotate(heads(attn["k_proj"], y, group))
        mixed = attention(query, key, heads(attn["v_proj"], y, group), config.description.head_dim**-0.5)
        x = x + linear(attn["o_proj"], mixed)
        y = norm(block["post_attention_layernorm"], x)
        gate = linear(mlp["gate_proj"], y)
        x = x + linear(mlp["down_proj"], gate / (1 + np.exp(-gate)) * linear(mlp["up_proj"], y))
    return norm(params["norm"], x) @ params["embed_tokens"]["embedding"].T


def stablelm_by_definition(config, params, tokens):
    size, time = config.description.head_dim, len(tokens)
    turned = int(size * config.rope_parameters["partial_rotary_factor"])

    def norm(x, scale, bias=0):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt(x.var(axis=-1, keepdims=True) + config.layer_norm_eps) * scale + bias

    def rotate(x):
        """Coordinate pair by coordinate pair, among the first ones."""
        x, half = x.copy(), turned // 2
        for i in range(half):
            angle = np.arange(time) * config.rope_parameters["rope_theta"] ** (-2 * i / turned)
            first, second = x[..., i].copy(), x[..., i + half].copy()
            x[..., i] = first * np.cos(angle) - second * np.sin(angle)
            x[..., i + half] = first * np.sin(angle) + second * np.cos(angle)
        return x

    def heads(attn, name, x):
        split = linear(attn[f"{name}_proj"], x).reshape(time, -1, size).swapaxes(0, 1)
        if name != "v":
            if config.qk_layernorm:
                scales = attn[f"{name}_norm"]["scale"]
                split = np.stack([norm(head, scale) for head, scale in zip(split, scales, strict=True)])
            split = rotate(split)
        return np.repeat(split, config.num_attention_heads // len(split), axis=0)

    x = params["embed_tokens"]["embedding"][tokens]
    for layer in range(config.num_hidden_layers):
        block = params["layers"][layer]
        attn, mlp, y = block["self_attn"], block["mlp"], norm(x, **block["input_layernorm"])
        mixed = linear(attn["o_proj"], attention(*(heads(attn, name, y) for name in "qkv"), size**-0.5))
        if not config.use_parallel_residual:
            y = norm(x + mixed, **block["post_attention_layernorm"])
        gate = linear(mlp["gate_proj"], y)
        x = x + mixed + linear(mlp["down_proj"], gate / (1 + np.exp(-gate)) * linear(mlp["up_proj"], y))
    x = norm(x, **params["norm"])
    return x @ params["embed_tokens"]["embedding"].T if config.tie_word_embeddings else linear(params["lm_head"], x)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_are_those_of_the_definition(model, dtype):
    """float64 parameters are computed with in float64 throughout; float32 ones in float32 also where x64 is on."""
    lm, _ = model
    by_definition = {"llama": llama_by_definition, "stablelm": stablelm_by_definition}
    by_definition = by_definition.get(getattr(lm.config, "model_type", None), gpt2_by_definition)
    with jax.enable_x64(True):
        params = random_params(lm, dtype)
        logits = logits_of(lm, params, TOKENS)
        assert str(logits.dtype) == dtype
        hidden, _ = jax.eval_shape(lm.hidden, params, jnp.asarray(TOKENS))
        assert str(hidden.dtype) == dtype
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = np.stack([by_definition(lm.config, exact, row) for row in TOKENS])
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol={"float32": 2e-5, "float64": 1e-12}[dtype])


def test_grouped_heads_are_repeated_heads():
    grouped, params = MODELS["llama"], random_params(MODELS["llama"])
    config = LlamaConfig(**LLAMA_SIZES | {"num_key_value_heads": 6}, attention_bias=True, mlp_bias=True)

    def repeat(path, leaf):
        if path[-2].key not in ("k_proj", "v_proj"):
            return leaf
        heads = leaf.reshape(*leaf.shape[:-1], 2, 4)
        return jnp.repeat(heads, 3, axis=-2).reshape(*leaf.shape[:-1], 24)

    full = Llama(config)
    repeated = jax.tree_util.tree_map_with_path(repeat, params)
    assert full.num_params() > grouped.num_params()
    with jax.enable_x64(True):
        logits = [logits_of(lm, params, TOKENS) for lm, params in ((full, repeated), (grouped, params))]
    np.testing.assert_allclose(*logits, rtol=0, atol=2e-5)

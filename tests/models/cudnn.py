"""A stand-in for an NVIDIA GPU of compute capability 9.0: cuDNN's attention, computed by JAX on the CPU.

Run as a program with 8 devices, it prints how far loss and gradient on meshes are from those of one device.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.interpreters import mlir

from jaxrl_llm import mesh as meshes
from jaxrl_llm import scoring
from jaxrl_llm.models import GPT2, Config, Decoder, GPT2Config, layers

MESHES = ("data=8", "data=2,fsdp=4", "data=4,model=2", "fsdp=2,model=4")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
QWEN = Config("qwen3", **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32)
MODELS = {
    "gpt2": GPT2(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
    "qwen3": Decoder(QWEN),
}


def mixed(query, key, value, bias, scale):
    """Values, mixed, and the logarithm of the sum of the exponentials of scores."""
    assert bias.dtype == query.dtype, "cuDNN reads a bias of another dtype as if it were of this one"
    key, value = (jnp.repeat(each, query.shape[2] // key.shape[2], axis=2) for each in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32) * scale
    scores += bias.astype(jnp.float32)
    total = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - total[..., None]).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value), total


def forward(*operands, scale, is_training, **_):
    found = mixed(*operands[:4], scale)
    return found if is_training else found[:1]


def backward(*operands, scale, **_):
    return jax.vjp(lambda *given: mixed(*given, scale)[0], *operands[:4])[1](operands[-1])


mlir.register_lowering(cudnn._dot_product_attention_fwd_p, mlir.lower_fun(forward, True), platform="cpu")
mlir.register_lowering(cudnn._dot_product_attention_bwd_p, mlir.lower_fun(backward, True), platform="cpu")


def pretend(patch):
    """Let JAX and the library find the GPU; `patch` is `setattr` or that of a `monkeypatch`."""
    patch(cudnn, "check_cudnn_version", lambda: 91800)
    patch(cudnn, "check_compute_capability", lambda least: float(least) <= 9)
    patch(cudnn, "is_cuda_compute_capability_equal", lambda other: other == "9.0")
    patch(layers, "compute_capability", lambda: (9, 0))


def rows():
    """Rows of 8 or fewer tokens, padded on the left to 9."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 9)), jnp.int32)
    mask = jnp.arange(9) >= 1 + jnp.arange(8)[:, None] // 2
    return scoring.Sequences(tokens, mask, mask & (jnp.arange(9) > 5))


def parameters(lm):
    """Random ones, large enough for attention to matter."""
    return jax.tree.map(lambda leaf: (4 * leaf).astype(jnp.bfloat16), lm.init(jax.random.key(0)))


def loss_and_gradient(lm, params, batch):
    loss, gradient = jax.jit(jax.value_and_grad(lambda params: -scoring.log_probs(lm, params, batch).sum()))(params)
    return float(loss), np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(gradient)])


def distance(found, expected):
    """The relative difference of two gradients."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def differences():
    """Return the distance of loss and gradient on each mesh from those of one device."""
    for name, exact in MODELS.items():
        lm, params = dataclasses.replace(exact, attention_form="cudnn"), parameters(exact)
        loss, gradient = loss_and_gradient(lm, params, rows())
        for mesh in map(meshes.mesh_of, MESHES):
            with jax.set_mesh(mesh):
                placed = meshes.shard_state(params, mesh), meshes.place_rows(rows(), 8, mesh)
                there = loss_and_gradient(lm, *placed)
            yield {"model": name, "mesh": str(mesh.shape), "loss": there[0] - loss, "d": distance(there[1], gradient)}


if __name__ == "__main__":
    pretend(setattr)
    print(json.dumps(list(differences())))

"""A DPO step and a GRPO step, on one device, on a mesh, or as one of two processes: prints losses and parameters."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_llm import mesh as meshes
from jaxrl_llm import scoring
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config
from jaxrl_llm.training import policy, reward_fns, steps
from jaxrl_llm.training.policy import METHODS
from jaxrl_llm.training.preference import PairBatch, preference_loss
from jaxrl_llm.training.rollout import Prompts, Sampler

LM = GPT2(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4))


def batches():
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        prompts = [rng.integers(1, 64, size).tolist() for size in rng.integers(1, 5, 8)]
        given = [rng.integers(1, 64, size).tolist() for size in rng.integers(1, 9, 8)]
        sides.append(scoring.pad_completions(prompts, given, length=16))
    prompts = Prompts(rng.integers(1, 64, (8, 4)).astype(np.int32), np.ones((8, 4), bool))
    return PairBatch(*sides), prompts


def two_steps(put_state, put_batch, whole):
    """Loss and checksum of the parameters after each step, and how a parameter is laid out."""
    optimizer = optax.sgd(0.5)
    ref = put_state(LM.init(jax.random.key(0)))
    begun = lambda: put_state(steps.initial_state(LM.init(jax.random.key(1)), optimizer, jax.random.key(2)))  # noqa: E731
    pairs, prompts = map(put_batch, batches())
    state, dpo = steps.make_step(preference_loss(LM, "dpo"), optimizer)(begun(), pairs, steps.Frozen(ref))
    found = {"dpo": [float(dpo["loss"]), *map(whole, jax.tree.leaves(state.params))]}
    trainer = policy.online(LM, optimizer)
    reward = reward_fns.of_tokens(lambda rows: jnp.where(rows.completion_mask, rows.tokens % 7, 0).sum(axis=1) * 1.0)
    state, grpo = trainer.step(
        begun(), prompts, reward, method=METHODS["grpo"], sampler=Sampler(6), frozen=steps.Frozen(ref)
    )
    found["grpo"] = [float(grpo["loss"]), float(grpo["reward"]), *map(whole, jax.tree.leaves(state.params))]
    found["layout"] = layout_of(state.params)
    adam = optax.adam(0.1)
    state = steps.initial_state(put_state(LM.init(jax.random.key(1))), adam, jax.random.key(2))
    state, _ = steps.make_step(preference_loss(LM, "dpo"), adam, microbatches=2)(state, pairs, steps.Frozen(ref))
    found["moments"] = [layout_of(each) for each in (state.opt_state[0].mu, state.opt_state[0].nu)]
    return found


def layout_of(params):
    """The parts of a kernel that the devices hold."""
    return [list(shard.data.shape) for shard in params["h"][0]["attn"]["c_attn"]["kernel"].addressable_shards]


def checksum(leaf):
    """A number that any change of the leaf changes; the same on every process."""
    weights = jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)
    return float(jax.jit(lambda leaf: (leaf * weights).sum())(leaf))


def main():
    layouts = [tuple(map(int, each.split("x"))) for each in sys.argv[1].split(",")]
    if len(sys.argv) > 2:
        meshes.initialize(sys.argv[2], processes=2, process=int(sys.argv[3]))
    own = slice(None)
    if jax.process_count() == 2:
        own = slice(4 * jax.process_index(), 4 * jax.process_index() + 4)  # each process has its own rows
    for layout in layouts:
        mesh = meshes.make_mesh(*layout)

        def put_state(tree, mesh=mesh):
            return meshes.shard_state(tree, mesh)

        def put_batch(batch, mesh=mesh):
            return meshes.shard_batch(jax.tree.map(lambda leaf: leaf[own], batch), mesh)

        with jax.set_mesh(mesh):
            print(json.dumps(two_steps(put_state, put_batch, checksum)))


if __name__ == "__main__":
    main()

"""Decode and score on one device and on meshes: prints the results of each as JSON, on the last also of all methods."""

import contextlib
import functools
import io
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxrl_llm as jl
from jaxrl_llm import cli, models
from jaxrl_llm import mesh as meshes
from jaxrl_llm.analysis.sycophancy import ModelSource
from jaxrl_llm.decoding import beam, core
from jaxrl_llm.models import heads
from jaxrl_llm.scoring import Choices
from tests.conftest import TINY_T5

PROMPTS = ["the cat", "the mat sat on", "on", "cat sat", "sat the", "mat on the", "the the", "a"]
OTHERS = {
    "diverse-beam": {"num_beams": 4, "num_groups": 2},
    "stochastic-beam": {"num_beams": 3},
    "contrastive": {},
    "lookup": {},
    "speculative": {},
    "best-of-n": {"num_candidates": 3},
    "mbr": {"num_candidates": 3},
}


def printed(*arguments):
    """Return the output of the command line."""
    sys.argv = ["jaxrl-llm", *map(str, arguments)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main()
    return out.getvalue()


def commands(folder, mesh):
    on = ["--model", f"{folder}/model", "--max-new-tokens", 12, *(["--mesh", mesh] if mesh else [])]
    found = {}
    for count in (1, 3, 5, 8):
        (folder / "prompts.txt").write_text("\n".join(PROMPTS[:count]))
        given = ["generate", "--prompts", folder / "prompts.txt", *on]
        found[f"greedy {count}"] = printed(*given, "--greedy")
        found[f"sample {count}"] = printed(*given, "--seed", 3, "--num-samples", 2, "--batch-size", 4)
    found["typical"] = printed(*given, "--typical-p", 0.9)
    found["beam"] = printed(*given, "--strategy", "beam", "--num-beams", 3, "--num-samples", 3)
    return found


def methods(folder, mesh):
    path = str(folder / "model")
    lm = jl.load(path, mesh=mesh)
    found = {"perplexity": lm.perplexity([*PROMPTS[:2], *PROMPTS[3:6]])}
    for strategy, options in {"greedy": {}, **OTHERS}.items():
        draft = {"draft_model": path} if strategy == "speculative" else {}
        found[strategy] = [
            each.tokens
            for each in lm.generate(PROMPTS[:3], strategy=strategy, max_new_tokens=6, seed=1, **options, **draft)
        ]
    many = lm.generate_many(PROMPTS[:3], rows=2, max_new_tokens=6, seed=1, progress=False)
    found["many"] = [each.tokens for each in many]
    for healed in (lm.generate, functools.partial(lm.generate_many, rows=2, progress=False)):
        texts = [each.text for each in healed(["the c", "on", "the cat sat on t"], heal=True, max_new_tokens=6, seed=1)]
        found.setdefault("healed", texts)
        assert found["healed"] == texts
    guided = lm.generate(PROMPTS[:3], max_new_tokens=6, guidance_prompt="on", guidance_scale=1.5)
    found["guided"] = [each.text for each in guided]
    found["tree"] = lm.search_tree(PROMPTS[0], branching=2, depth=3).best
    found["stream"] = "".join(lm.stream(PROMPTS[0], max_new_tokens=12, seed=1))
    found["attention"] = lm.attention(PROMPTS[1]).weights.tolist()
    found["evaluated"] = [*evaluated(path, mesh).values()]
    head = {"model": lm.params, "head": jnp.linspace(-1, 1, 16)}
    reward = heads.LoadedReward(heads.ScalarHead(lm.model), head, lm.tokenizer, lm.config)
    found["scores"] = reward.score(PROMPTS[:5])
    rows = [Choices(lm.encode(each), [[3, 4], [5]]) for each in PROMPTS[:3]]
    found["answers"] = [each.tolist() for each in ModelSource(lm.loaded, batch_size=2, progress=False).log_probs(rows)]
    params = TINY_T5.init(jax.random.key(0))
    if mesh is not None:
        params = meshes.shard_state(params, meshes.mesh_of(mesh))
    t5 = jl.LM(models.Loaded(TINY_T5, params, None, {}))
    sources = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]
    for strategy in ("greedy", "beam"):
        found[f"t5 {strategy}"] = [each.tokens for each in t5.generate(sources, strategy=strategy, max_new_tokens=6)]
    found["t5 perplexity"] = t5.perplexity(sources, [[3, 4], [5], [6, 7, 8]])
    return found


def evaluated(path, mesh):
    rows = [{"prompt": prompt, "completion": " sat on the mat"} for prompt in PROMPTS[:3]]
    options = {"max_new_tokens": 6, "temperature": 1.0, "batch_size": 2}
    with contextlib.redirect_stdout(io.StringIO()):
        return jl.evaluate(
            path, rows, reward=lambda prompts, texts: [len(each) for each in texts], mesh=mesh, **options
        )


def caches(path, mesh):
    """The shapes of keys and values, [rows, heads, slots], on each device for 8 prompts and 3 beams of each."""
    lm = jl.load(path, mesh=mesh)
    with jax.set_mesh(meshes.lies_on(lm.params)):
        request = core.request(lm.model, [[1, 2, 3]] * 8, max_new_tokens=40, greedy=True, align=True)
        penalties, rules = beam.Penalties(jnp.ones(8), jnp.zeros(8)), beam.Rules(1, 0, "sequence", "token")
        lowered = beam.search.lower(lm.model, lm.params, request, penalties, num_beams=3, rules=rules)
    text, slots = lowered.compile().as_text(), request.prompts.shape[1] + request.num_steps
    return sorted({tuple(map(int, each)) for each in re.findall(rf"f32\[(\d+),(\d+),({slots}),8\]", text)})


def main():
    folder, *layouts = sys.argv[1:]
    for layout in layouts:
        mesh = None if layout == "one" else layout
        found = commands(Path(folder), mesh)
        if layout in ("one", layouts[-1]):
            found |= methods(Path(folder), mesh)
        if layout == layouts[-1]:
            found["caches"] = caches(f"{folder}/model", mesh)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

"""A DPO and a GRPO step of Llama 3's shapes on 8 to 256 devices: compiled for fake devices, with a roofline. None runs.

    python -m benchmarks.scaling

Arrays are abstract, so that no memory holds the models. Every step is compiled with 4 and with 8 layers; all numbers
are linear in the layers, which the 8B model checks with all of its own. Small Llamas whose every array is in proportion
to the 8B model's really run, on 8 fake devices, and their measured memory is extrapolated.

Bytes of a device are XLA's for CPUs, scheduled for least memory. They are above those of GPUs and TPUs: CPUs multiply
bfloat16 matrices as float32. Communication and products are counted in the partitioned program, before that.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tqdm import tqdm

from benchmarks.hlo import Program

FEW, MORE = 4, 8  # layers that are compiled
SMALL = ((16, 2), (8, 2), (8, 6))  # scale and layers of the models that run
TIMES = 3  # that each runs; the median counts, for a system may take back memory meanwhile
HOST = 8  # GPUs of a host
STEPS = ("dpo", "grpo", "decode")
GROUP = 8  # completions of a prompt


class Chip(NamedTuple):
    """Peak rates of a chip: floating-point operations and bytes a second."""

    bfloat16: float
    float32: float  # products of float32 matrices at JAX's default precision
    memory: float
    capacity: float  # bytes
    within: float  # sent to the chips of a host, or of a TPU's slice
    between: float | None  # sent to other hosts; None if all are within


CHIPS = {
    # NVIDIA H100 Tensor Core GPU datasheet, SXM: 989 TFLOP/s dense in bfloat16 and half of it in TF32, which JAX uses
    # for float32; 3.35 TB/s; NVLink 900 GB/s, half of it each way. DGX H100: one 400 Gb/s InfiniBand port a GPU.
    "H100": Chip(989e12, 494.5e12, 3.35e12, 80e9, 450e9, 50e9),
    # Google Cloud, TPU v5p: 459 TFLOP/s in bfloat16, which JAX rounds float32 to by default on TPUs; 2,765 GB/s; 95 GB;
    # interconnect 4,800 Gb/s a chip.
    "v5p": Chip(459e12, 459e12, 2.765e12, 95e9, 600e9, None),
}

LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0}
MODELS = {  # config.json of meta-llama/Meta-Llama-3-8B and -70B
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
MESHES = {  # data × fsdp × model
    "8B": [(1, 8, 1), (8, 8, 1), (1, 8, 8), (32, 8, 1)],
    "70B": [(1, 8, 1), (1, 64, 1), (1, 8, 8), (4, 64, 1), (1, 32, 8)],
}
OPTIONS = {  # of the compiler: as little memory as possible, as GPUs and TPUs are scheduled; no time for fast code
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",  # one sum of all gradients would hold all of them
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of what is compiled."""

    length: int = 2048
    """Tokens of a row."""
    rows: int = 2
    """Rows of each part of the batch: a pair for DPO, two completions for GRPO."""
    out: Path = Path(__file__).parent / "results" / "scaling.json"
    devices: int | None = None
    """Be one of the processes: compile all steps for so many devices."""
    whole: bool = False
    """Be one of the processes: compile the 8B model's DPO step with all layers for 8 devices."""
    measure: tuple[int, int] | None = None
    """Be one of the processes: run the 8B model's DPO step on 8 devices and measure its memory. Every width and length
    is divided by the first number, so that arrays are smaller by its square; the second is the number of layers."""


# One process ----------------------------------------------------------------------------------------------------------


def model_of(name: str, layers: int, *, scale: int = 1) -> Any:
    """Return a model of Llama 3's shapes with so many layers; every width divided by `scale`."""
    from jaxrl_llm.models import Llama, LlamaConfig

    fields = LLAMA3 | MODELS[name] | {"num_hidden_layers": layers}
    for width in ("vocab_size", "hidden_size", "intermediate_size"):
        fields[width] //= scale
    return Llama(LlamaConfig(**fields, tie_word_embeddings=False), checkpoint_blocks=True)


def programs_of(step: str, lm: Any, mesh: Any, *, rows: int, length: int) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the jitted programs of a step and their abstract arguments: GRPO scores its completions, then updates.

    As the trainers make them with dtype bfloat16: AdamW, weights and moments in float32, the reference in bfloat16.
    """
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxrl_llm.mesh import ROWS, row_shards, shardings
    from jaxrl_llm.scoring import Sequences
    from jaxrl_llm.training import policy, steps
    from jaxrl_llm.training.preference import PairBatch, preference_loss
    from jaxrl_llm.training.rollout import Rollout

    def placed(tree: Any, sharding: Any = None) -> Any:
        where = shardings(tree, mesh) if sharding is None else jax.tree.map(lambda _: sharding, tree)
        return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), tree, where)

    def of_rows(count: int, dtype: Any, *shape: int) -> Any:
        return placed(jax.ShapeDtypeStruct((count, *shape), dtype), NamedSharding(mesh, P(ROWS)))

    def sequences(count: int) -> Sequences:
        return Sequences(*(of_rows(count, dtype, length) for dtype in (jnp.int32, jnp.bool_, jnp.bool_)))

    count = rows * row_shards(mesh)
    optimizer = optax.adamw(1e-6)
    narrow = steps.compute_in("bfloat16")
    begun = jax.eval_shape(lambda params: steps.initial_state(params, optimizer, jax.random.key(0)), lm.abstract_params)
    state, ref = placed(begun), placed(jax.eval_shape(lambda params: narrow(params, None), lm.abstract_params))
    frozen = steps.Frozen(ref=ref)
    if step == "dpo":
        pairs = PairBatch(sequences(count // 2), sequences(count // 2))
        yield steps.make_step(preference_loss(lm, "dpo"), optimizer, view=narrow), (state, pairs, frozen)
    elif step == "grpo":
        method = dataclasses.replace(policy.METHODS["grpo"], group_size=GROUP)
        trainer = policy.online(lm, optimizer, view=narrow)
        per_token, per_row = of_rows(count, jnp.float32, length), of_rows(count, jnp.float32)
        drawn = Rollout(sequences(count), per_token, of_rows(count, jnp.bool_))
        yield trainer.score, (state, drawn, per_row, method, frozen, 1.0)
        scored = policy.Experience(sequences(count), *[per_token] * 6)
        yield trainer.update, (state, scored, method, frozen, None, 1.0)
    else:
        heads = NamedSharding(mesh, P(ROWS, "model"))
        cache = jax.eval_shape(lambda: lm.init_cache(count, length, dtype=jnp.bfloat16))
        memory, valid = placed(cache.memory, heads), placed(cache.valid, NamedSharding(mesh, P(ROWS)))
        cache = dataclasses.replace(cache, memory=memory, valid=valid)
        token = of_rows(count, jnp.int32, 1)
        yield jax.jit(lm.apply, donate_argnums=2), (ref, token, cache)


def compiled(step: Any, arguments: tuple[Any, ...], mesh: Any) -> tuple[Any, Program]:
    """Return the compiled program of a step, and its text after partitioning."""
    import jax

    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        program = step.lower(*arguments).compile(compiler_options=OPTIONS | dump)
        (text,) = Path(folder).glob("*.after_spmd-partitioning.*")
        return program, Program(text.read_text())


def counted(program: Any, partitioned: Program) -> dict[str, float]:
    """Return what a device holds, computes, reads and writes, and sends in one run of a program.

    Memory is read and written at least by every matrix product once and by arguments and results once.
    """
    memory = program.memory_analysis()
    found = {
        "arguments": memory.argument_size_in_bytes,
        "further": memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "moved": memory.argument_size_in_bytes + memory.output_size_in_bytes,
    }
    found |= dict.fromkeys(("bfloat16 FLOPs", "float32 FLOPs", "sent", "sent within hosts", "sent between hosts"), 0)
    for product in partitioned.products():
        found[f"{'bfloat16' if product.dtype == 'bf16' else 'float32'} FLOPs"] += product.times * product.flops
        found["moved"] += product.times * product.bytes
    for collective in partitioned.collectives():
        for sent, devices in collective.sent():
            hosts = len({device // HOST for device in devices})
            own = len(devices) // hosts  # of a host: together they send to other hosts, each a part
            found["sent"] += sent
            whole = sent * len(devices) / max(1, len(devices) - 1)
            found["sent within hosts"] += whole * (own - 1) / own
            found["sent between hosts"] += whole / own * (hosts - 1) / hosts
    return {name: float(value) for name, value in found.items()}


def of_step(step: str, lm: Any, mesh: Any, config: Config) -> dict[str, float]:
    """Return `counted` of a step: the bytes of its largest program, and the sums of all else."""
    found = []
    for program, arguments in programs_of(step, lm, mesh, rows=config.rows, length=config.length):
        found.append(counted(*compiled(program, arguments, mesh)))
    largest = max(found, key=lambda each: each["arguments"] + each["further"])
    held = ("arguments", "further")
    return {name: largest[name] if name in held else sum(each[name] for each in found) for name in largest}


def compile_all(config: Config) -> None:
    """Print a line of JSON for every step on meshes of so many devices."""
    for name, meshes in MESHES.items():
        for sizes in meshes:
            if math.prod(sizes) == config.devices:
                for step in STEPS:
                    for layers in (FEW, MORE):
                        compile_one(name, step, sizes, layers, config)


def compile_one(name: str, step: str, sizes: tuple[int, int, int], layers: int, config: Config) -> None:
    """Print a line of JSON for a step."""
    import jax

    from jaxrl_llm.mesh import make_mesh

    jax.config.update("jax_enable_compilation_cache", False)  # a cached program leaves no text
    found = of_step(step, model_of(name, layers), make_mesh(*sizes), config)
    print(json.dumps({"model": name, "step": step, "mesh": sizes, "layers": layers, "found": found}), flush=True)


def measure(config: Config) -> None:
    """Print the most memory that was resident for two DPO steps of the 8B model scaled down, in bytes a device."""
    import ctypes

    import jax
    import numpy as np

    from jaxrl_llm import scoring
    from jaxrl_llm.mesh import make_mesh

    scale, layers = config.measure
    scoring.CHUNK_LOGITS //= scale**2
    mesh, lm = make_mesh(*MESHES["8B"][0]), model_of("8B", layers, scale=scale)
    ((step, arguments),) = programs_of("dpo", lm, mesh, rows=config.rows, length=config.length // scale)
    with jax.set_mesh(mesh):
        program = step.lower(*arguments).compile(compiler_options=OPTIONS)
    rng = np.random.default_rng(0)

    def filled(leaf: Any) -> Any:
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), leaf.sharding)
        # Squares, for AdamW's second moments are not negative; 0 for the number of steps, 1 for tokens and masks.
        values = rng.normal(0, 0.1, leaf.shape) ** 2 if leaf.dtype.kind in "fV" else np.full(leaf.shape, leaf.ndim > 0)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding, may_alias=False)

    trim = ctypes.CDLL("libc.so.6").malloc_trim  # what was freed is resident no more
    trim(0)
    before = status("VmRSS")
    arguments = jax.block_until_ready(jax.tree.map(filled, arguments))
    trim(0)
    held = status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew
    state, *rest = arguments
    del arguments
    for _ in range(2):
        state, metrics = jax.block_until_ready(program(state, *rest))
    memory = program.memory_analysis()
    print(
        json.dumps(
            {
                "scale": scale,
                "layers": layers,
                "loss": float(metrics["loss"]),
                "arguments": held / mesh.size,
                "measured": (status("VmHWM") - before) / mesh.size,
                "compiled": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
            }
        )
    )


def status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024


# All of them ----------------------------------------------------------------------------------------------------------


def answers_of(devices: int, *arguments: str) -> list[dict[str, Any]]:
    """Return the lines of a process of its own, with so many fake devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what compiles and runs is measured
    command = [sys.executable, "-m", "benchmarks.scaling", *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{process.stderr[-3000:]}")
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


def at(layers: int, few: float, more: float) -> float:
    """Return the value on the line through those of `FEW` and `MORE` layers."""
    return few + (more - few) * (layers - FEW) / (MORE - FEW)


def formula(step: str, model: str, tokens: int, length: int) -> float:
    """Return the floating-point operations of a step.

    2N a token and pass for the N weights of blocks and unembedding, and 4 · length · width a layer for attention
    without regard to the causal mask. The backward pass counts twice and what `checkpoint_blocks` recomputes once: DPO
    has five passes with the reference's, GRPO six with those that score.
    """
    fields = LLAMA3 | MODELS[model]
    width, inner, layers = (fields[each] for each in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    keys = fields["num_key_value_heads"] * width // fields["num_attention_heads"]
    weights = layers * (2 * width * width + 2 * width * keys + 3 * width * inner) + fields["vocab_size"] * width
    passes = {"dpo": 5, "grpo": 6, "decode": 1}[step]
    return passes * tokens * (2 * weights + 4 * length * width * layers)


def row_of(
    model: str,
    step: str,
    mesh: tuple[int, int, int],
    few: dict[str, float],
    more: dict[str, float],
    config: Config,
) -> dict[str, Any]:
    """Return a row of the table: a step of the whole model, from those of few and more layers."""
    data, fsdp, parts = mesh
    layers, devices = MODELS[model]["num_hidden_layers"], data * fsdp * parts
    found = {name: at(layers, few[name], more[name]) for name in few}
    tokens = config.rows * data * fsdp * (1 if step == "decode" else config.length)
    flops, held = found["bfloat16 FLOPs"] + found["float32 FLOPs"], found["arguments"] + found["further"]
    row = {"model": model, "step": step, "devices": devices, "mesh": f"{data} × {fsdp} × {parts}", "tokens": tokens}
    row |= {"arguments GB": found["arguments"] / 1e9, "held GB": held / 1e9, "sent GB": found["sent"] / 1e9}
    row |= {"TFLOPs": flops / 1e12, "TFLOPs, float32": found["float32 FLOPs"] / 1e12}
    row |= {"TFLOPs / formula": flops * devices / formula(step, model, tokens, config.length)}
    for name, chip in CHIPS.items():
        links = [found["sent"] / chip.within]
        if chip.between is not None:
            links = [found["sent within hosts"] / chip.within, found["sent between hosts"] / chip.between]
        seconds = {
            "compute": found["bfloat16 FLOPs"] / chip.bfloat16 + found["float32 FLOPs"] / chip.float32,
            "memory": found["moved"] / chip.memory,
            "communication": max(links),
        }
        times = {f"{part} ms": 1e3 * each for part, each in seconds.items()}
        row[name] = {"fits": held <= chip.capacity, "bound": max(seconds, key=seconds.get), **times}
    return row


def rates() -> dict[str, dict[str, float]]:
    """Return the peak rates of the chips in tera- and gigaunits."""
    units = {"bfloat16": 1e12, "float32": 1e12, "memory": 1e12, "capacity": 1e9, "within": 1e9, "between": 1e9}
    return {
        name: {field: value / units[field] for field, value in chip._asdict().items() if value is not None}
        for name, chip in CHIPS.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table of Markdown."""
    names = ["model", "step", "devices", "data × fsdp × model", "tokens", "GB held", "GB sent"]
    for name in CHIPS:
        names += [f"{name}: fits", "compute, memory, communication, ms"]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        cells = [row["model"], row["step"], row["devices"], row["mesh"], f"{row['tokens']:,}"]
        cells += [f"{row['held GB']:.1f}", f"{row['sent GB']:.1f}"]
        for name in CHIPS:
            found = row[name]
            times = []
            for part in ("compute", "memory", "communication"):
                written = f"{found[f'{part} ms']:.1f}"
                times.append(f"**{written}**" if part == found["bound"] else written)
            cells += ["yes" if found["fits"] else "no", ", ".join(times)]
        lines.append(cells)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def summary(answers: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Return the rows of the table and the checks, from the lines of all processes."""
    found: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for each in answers:
        if "found" in each:
            case = (each["model"], each["step"], tuple(each["mesh"]))
            found.setdefault(case, {})[each["layers"]] = each["found"]
    rows = []
    for model, meshes in MESHES.items():
        for sizes in meshes:
            for step in STEPS:
                case = found[(model, step, sizes)]
                rows.append(row_of(model, step, sizes, case[FEW], case[MORE], config))
    whole, first = MODELS["8B"]["num_hidden_layers"], found[("8B", "dpo", MESHES["8B"][0])]
    ratios = {
        name: each / at(whole, first[FEW][name], first[MORE][name]) for name, each in first[whole].items() if each
    }
    runs = {
        small: _median([each for each in answers if (each.get("scale"), each["layers"]) == small]) for small in SMALL
    }
    (_, few), (_, more) = SMALL[1:]
    held = (first[whole]["arguments"] + first[whole]["further"]) / 1e9
    extrapolated = {}
    for kind in ("arguments", "measured", "compiled"):
        smallest, small, deeper = (runs[each][kind] for each in SMALL)
        # A process also holds what does not depend on sizes: the difference of two scales is free of it.
        shares = [1 / scale**2 for scale, _ in SMALL]
        shallow = (small - smallest) / (shares[1] - shares[0])
        layer = (deeper - small) / shares[1] / (more - few)
        extrapolated[kind] = (shallow + (whole - few) * layer) / 1e9
    return {
        "rows": rows,
        "8B, dpo, 8 devices": {
            "all layers compiled / extrapolated": ratios,
            "compiled GB": held,
            "small models, extrapolated GB": extrapolated,
            "measured / compiled": extrapolated["measured"] / held,
            "small models": [runs[each] for each in SMALL],
        },
    }


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: statistics.median(each[name] for each in runs) for name in runs[0]}


def main(config: Config) -> None:
    """Compile all, print the table and write the numbers."""
    if config.devices is not None:
        compile_all(config)
        return
    if config.whole:
        compile_one("8B", "dpo", MESHES["8B"][0], MODELS["8B"]["num_hidden_layers"], config)
        return
    if config.measure is not None:
        measure(config)
        return
    settings = ["--length", str(config.length), "--rows", str(config.rows)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(answers_of, devices, *job, *settings) for devices, *job in jobs()]
        answers = [answer for each in tqdm(running, unit="process") for answer in each.result()]
    shown = {"length": config.length, "rows": config.rows, "layers": [FEW, MORE], "cpus": os.cpu_count()}
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (used.ru_utime + used.ru_stime) / 60
    result = {"config": shown, "processor minutes": minutes, "chips": rates(), **summary(answers, config)}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result["rows"]))
    print(json.dumps(result["8B, dpo, 8 devices"], indent=1))


def jobs() -> list[list[Any]]:
    """Return the number of fake devices and the arguments of every process, the longest first."""
    counts = sorted({math.prod(sizes) for meshes in MESHES.values() for sizes in meshes}, reverse=True)
    return [
        *([count, "--devices", str(count)] for count in counts),
        [HOST, "--whole"],
        *([HOST, "--measure", str(scale), str(layers)] for scale, layers in SMALL * TIMES),
    ]


if __name__ == "__main__":
    main(tyro.cli(Config))

"""Seconds to the first token: of the command line, and of a first call, with its peak memory.

    PYTHONPATH=.parity python -m benchmarks.startup

Each case is a process of its own. "First call" is all after loading that the second call does not need again:
tracing and compiling, with an empty compilation cache (cold) and with the one that the cold run left (warm). These
calls are of GPT-2 small. The command line, `jaxrl-llm generate` with tiny-gpt2, is timed from its start to its first
letter; beside it a script of transformers + torch that reads the same folder and prints a token.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "startup.json"
PROMPT, NEW_TOKENS, ROUNDS = 32, 32, 5


def measure(library: str, folder: str, batch: int) -> dict[str, float]:
    """In this process: load, generate greedily twice, report."""
    call = _ours(folder, batch) if library == "jaxrl_llm" else _theirs(folder, batch)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first_call_overhead_seconds": times[0] - times[1], "peak_mebibytes": peak}


def _ours(folder: str, batch: int) -> Any:
    import jax.numpy as jnp

    from jaxrl_llm import models
    from jaxrl_llm.decoding import generate

    loaded = models.load(folder)
    prompts = jnp.ones((batch, PROMPT), jnp.int32)
    return lambda: generate(loaded.model, loaded.params, prompts, max_new_tokens=NEW_TOKENS, greedy=True)


def _theirs(folder: str, batch: int) -> Any:
    import torch
    import transformers

    torch.set_num_threads(1 if batch == 1 else os.cpu_count())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = torch.ones((batch, PROMPT), dtype=torch.long)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def call() -> None:
        with torch.inference_mode():
            model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)

    return call


def _save_random_gpt2(folder: str) -> None:
    import jax

    from jaxrl_llm import models

    lm = models.GPT2()
    models.save(folder, lm, lm.init(jax.random.key(0)))


def _in_a_process(*arguments: str, cache: str) -> str:
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-m", "benchmarks.startup", *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


SCRIPT = """
import sys, torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
given = tokenizer("I have a dream", return_tensors="pt")
print(tokenizer.decode(model.generate(**given, max_new_tokens=1, do_sample=True)[0, -1]), flush=True)
"""


def first_letters(cache: str) -> dict[str, list[float]]:
    """Seconds to the first letter of either command, in turns; the first round, which compiles, does not count."""
    from jaxrl_llm.models import loading

    commands = {
        "jaxrl-llm": ["-m", "jaxrl_llm.cli", "generate", "I have a dream", "--max-new-tokens", "8"],
        "torch": ["-c", SCRIPT, str(loading.locate("tiny-gpt2"))],
    }
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_ in range(1 + ROUNDS):
        for name, words in commands.items():
            started = time.perf_counter()
            with subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.PIPE) as process:
                process.stdout.read(1)
                if round_:
                    seconds[name].append(time.perf_counter() - started)
                process.stdout.read()
    return seconds


def main() -> None:
    """Run every case in its own process, print them, write `benchmarks/results/startup.json`."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        _in_a_process("save", folder, cache=cache + "/other")
        cases = [(case, batch) for batch in (1, 32) for case in ("cold", "warm", "torch")]
        for case, batch in cases:
            library = "torch" if case == "torch" else "jaxrl_llm"
            output = _in_a_process(library, folder, str(batch), cache=f"{cache}/{batch}")
            rows.append({"library": library, "cache": case, "batch": batch, **json.loads(output)})
            seconds, mebibytes = rows[-1]["first_call_overhead_seconds"], rows[-1]["peak_mebibytes"]
            print(f"batch {batch:2d}  {case:5s}  first call +{seconds:.1f} s, peak {mebibytes:.0f} MiB")
        letters = first_letters(f"{cache}/letters")
    medians = {name: statistics.median(each) for name, each in letters.items()}
    print(", ".join(f"first letter of {name} {each:.2f} s" for name, each in medians.items()))
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"cpus": os.cpu_count(), "rows": rows, "first letter": {"seconds": letters, "median": medians}}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "save":
        _save_random_gpt2(sys.argv[2])
    else:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))

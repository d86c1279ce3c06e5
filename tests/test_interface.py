"""The public interface: strings in, strings out, and the same numbers as the functional layer below it."""

import functools
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

import jaxrl_llm as jl
from jaxrl_llm import decoding, decoding_options, models, oracle, scoring, text, translation
from jaxrl_llm.analysis import attention, landscape
from jaxrl_llm.analysis.chrf import sentence_chrf
from jaxrl_llm.decoding import transforms
from jaxrl_llm.decoding.transforms import ForcedTokens
from jaxrl_llm.interface import LM
from jaxrl_llm.tabular import TabularLM
from tests.conftest import first_quick, random_params
from tests.test_cli import CONTEXT, LENGTH, PROMPTS, TEMPLATE, write_model


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return jl.load(write_model(tmp_path_factory.mktemp("interface"), template=TEMPLATE))


@pytest.fixture(scope="module")
def bare(lm):
    """The same model without a tokenizer."""
    return LM(models.Loaded(lm.model, lm.params, None, lm.config), "bare")


@pytest.fixture(scope="module")
def t5():
    return jl.load("tiny-t5")


@pytest.fixture(scope="module")
def table():
    model = TabularLM(vocab_size=3, horizon=4)
    return LM(models.Loaded(model, random_params(model), None, {}), "table")


def padded(lm, prompts, *, n=1):
    """Arguments of the functional layer: tokens and mask, each row n times."""
    tokens, mask = text.left_pad([row for row in map(lm.tokenizer.encode, prompts) for _ in range(n)])
    return (lm.model, lm.params, jnp.asarray(tokens)), {"prompt_mask": jnp.asarray(mask), "eos_id": lm.eos_ids}


def rows(generation):
    return [
        row[mask].tolist() for row, mask in zip(*map(np.asarray, (generation.tokens, generation.mask)), strict=True)
    ]


# Names ----------------------------------------------------------------------------------------------------------------


def test_importing_it_imports_nothing_heavy_until_a_name_is_used():
    code = """
import json, sys
import jaxrl_llm as jl
dir(jl), jl.__version__
heavy = {"jax", "flax", "numpy", "matplotlib", "transformers"}
before = sorted(heavy & set(sys.modules))
jl.objectives.kl.k1, jl.TabularLM, jl.LM
print(json.dumps([before, "jax" in sys.modules, "matplotlib" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1]
    )
    assert json.loads(done.stdout) == [[], True, False], done.stderr


def test_every_name_is_there_with_its_submodules():
    assert {"load", "LM", "oracle", "objectives", "decoding", "scoring", "plots", "__version__"} <= set(dir(jl))
    for name in jl.__all__:
        assert getattr(jl, name) is not None
    assert callable(jl.objectives.preference.dpo_loss) and callable(jl.analysis.landscape.loss_surface)
    assert callable(jl.plots.style.look) and callable(jl.training.steps.make_step)
    assert "preference" in dir(jl.objectives)


@pytest.mark.parametrize("module", [jl, jl.objectives, jl.analysis, jl.plots, jl.training, jl.data])
def test_a_typo_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'laod'"):
        module.laod  # noqa: B018


def test_the_signature_shows_every_option():
    options = {
        field for group in (decoding_options.Sampling, decoding_options.Search) for field in group.__dataclass_fields__
    }
    assert {"prompts", "strategy", "n", "chat", "transforms", *options} <= set(
        inspect.signature(LM.generate).parameters
    )
    assert set(decoding_options.TreeSearch.__dataclass_fields__) < set(inspect.signature(LM.search_tree).parameters)
    assert inspect.signature(LM.generate).parameters["temperature"].default == 1.0
    for method, group in (
        (LM.generate, decoding_options.Search),
        (LM.chat, decoding_options.Sampling),
        (LM.search_tree, decoding_options.TreeSearch),
    ):
        assert all(f"\n    {name} (" in method.__doc__ for name in group.__dataclass_fields__), method


def test_every_option_belongs_to_a_strategy():
    options = {
        field for group in (decoding_options.Sampling, decoding_options.Search) for field in group.__dataclass_fields__
    }
    assert options == decoding_options.EVERYWHERE.union(*decoding_options.USED.values())


# Decoding -------------------------------------------------------------------------------------------------------------


def test_generate_is_the_functional_generate(lm):
    warp = transforms.Chain((transforms.RepetitionPenalty(1.2), transforms.Temperature(1.5), transforms.TopP(0.9)))
    arguments, common = padded(lm, PROMPTS)
    common |= {"max_new_tokens": LENGTH, "transform": warp, "key": jax.random.key(7)}
    expected = decoding.generate(*arguments, n=2, **common)
    options = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "max_new_tokens": LENGTH}
    found = lm.generate(PROMPTS, n=2, seed=7, **options)
    assert [each.tokens for each in found] == rows(expected)
    assert [each.prompt for each in found] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [each.index for each in found] == [0, 0, 1, 1, 2, 2]
    for each, logp, mask in zip(found, np.asarray(expected.logp), np.asarray(expected.mask), strict=True):
        np.testing.assert_array_equal(each.logp, logp[mask])
        assert each.log_prob == pytest.approx(logp[mask].sum())
        row = lm.tokenizer.encode(each.prompt)
        assert each.prompt + each.text == lm.decode(row + each.tokens)
    assert [each.tokens for each in lm.generate(PROMPTS, n=2, seed=7, **options)] == rows(expected)
    assert [each.tokens for each in lm.generate(PROMPTS, n=2, seed=8, **options)] != rows(expected)


def test_every_form_of_prompts_gives_the_same(lm):
    ids = lm.encode("the cat")
    expected = lm.generate("the cat", greedy=True, max_new_tokens=LENGTH)[0]
    forms = [["the cat"], ("the cat",), ids, tuple(ids), [ids], [tuple(ids)], np.asarray(ids), jnp.asarray([ids])]
    forms += [[np.asarray(ids)], np.asarray([ids], np.int64), [np.int32(each) for each in ids]]
    for form in forms:
        (found,) = lm.generate(form, greedy=True, max_new_tokens=LENGTH)
        assert (found.tokens, found.text) == (expected.tokens, expected.text), form
    ragged = lm.generate(lm.encode(PROMPTS), greedy=True, max_new_tokens=LENGTH)
    assert ragged[0].tokens == expected.tokens and len(ragged) == 3


def expected_of(strategy, lm, arguments, common):
    """The tokens of each row, from the functional layer."""
    key = {"key": jax.random.key(0)}
    if strategy in ("sample", "greedy"):
        return rows(decoding.generate(*arguments, **common, greedy=strategy == "greedy", **key))
    if strategy == "contrastive":
        return rows(decoding.contrastive_search(*arguments, **common, top_k=6, alpha=0.6))
    if strategy in ("speculative", "lookup"):
        draft = decoding.DraftModel(lm.model, lm.params) if strategy == "speculative" else decoding.PromptLookup(3)
        return rows(decoding.speculative_generate(*arguments, **common, **key, num_draft=4, draft=draft).generation)
    if strategy == "best-of-n":

        def score(samples):
            return samples.logp.sum(axis=-1) / samples.mask.sum(axis=-1)

        return rows(decoding.best_of_n(*arguments, **common, **key, n=8, score=score).generation)
    if strategy == "mbr":
        repeated, several = padded(lm, PROMPTS, n=8)
        samples = rows(decoding.generate(*repeated, **common | several, **key))
        groups = [samples[start : start + 8] for start in range(0, len(samples), 8)]
        return [
            group[decoding.minimum_bayes_risk([lm.decode(each) for each in group], sentence_chrf).index]
            for group in groups
        ]
    beams = {
        "beam": lambda: decoding.beam_search(*arguments, **common, num_beams=4),
        "diverse-beam": lambda: decoding.beam_search(
            *arguments, **common, num_beams=4, num_groups=4, diversity_penalty=0.5
        ),
        "sampled-beam": lambda: decoding.beam_search(*arguments, **common, **key, num_beams=4),
        "stochastic-beam": lambda: decoding.stochastic_beam_search(*arguments, **common, **key, num_beams=4),
    }[strategy]()
    return [np.asarray(beams.tokens[row, 0])[np.asarray(beams.mask[row, 0])].tolist() for row in range(len(PROMPTS))]


COMMON = ("sample", "contrastive")  # beams have a test of their own


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in COMMON)) for name in sorted(decoding_options.USED)],
)
def test_every_strategy_is_its_decoder(lm, strategy):
    arguments, common = padded(lm, PROMPTS)
    expected = expected_of(strategy, lm, arguments, common | {"max_new_tokens": LENGTH})
    options = {"draft_model": lm} if strategy == "speculative" else {}
    found = lm.generate(PROMPTS, strategy=strategy, max_new_tokens=LENGTH, **options)
    assert [each.tokens for each in found] == expected
    for each in found:
        logp = lm.log_probs([lm.encode(each.prompt)], [each.tokens])[0]
        assert each.log_prob == pytest.approx(logp.sum(), abs=1e-3)
        np.testing.assert_allclose(each.logp, logp, atol=1e-4)


def test_beam_search_gives_the_hypotheses_best_first(lm):
    arguments, common = padded(lm, PROMPTS)
    options = {"num_beams": 3, "length_penalty": 0.7, "max_new_tokens": LENGTH}
    beams = decoding.beam_search(*arguments, **common, **options, no_repeat_ngram=2)
    found = lm.beam_search(PROMPTS, **options, no_repeat_ngram=2)
    assert [each.index for each in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    every, logp, masks = (np.asarray(each).reshape(9, -1) for each in (beams.tokens, beams.logp, beams.mask))
    assert [each.tokens for each in found] == [row[mask].tolist() for row, mask in zip(every, masks, strict=True)]
    for each, row, mask in zip(found, logp, masks, strict=True):
        np.testing.assert_array_equal(each.logp, row[mask])
    np.testing.assert_allclose([each.log_prob for each in found], np.asarray(beams.log_prob).reshape(-1), rtol=1e-6)
    assert [each.log_prob for each in lm.beam_search(PROMPTS, n=1, **options, no_repeat_ngram=2)] == [
        each.log_prob for each in found[::3]
    ]


@pytest.mark.slow
def test_beam_search_gives_the_hypotheses_of_groups(lm):
    arguments, common = padded(lm, PROMPTS)
    groups = {"num_groups": 4, "diversity_penalty": 0.5, "num_beams": 4, "max_new_tokens": LENGTH}
    diverse = decoding.beam_search(*arguments, **common, **groups)
    found = lm.beam_search(PROMPTS, **groups)
    np.testing.assert_allclose([each.log_prob for each in found], np.asarray(diverse.log_prob).reshape(-1), rtol=1e-6)


@pytest.mark.slow
def test_beams_end_at_stop_strings_and_avoid_each_other(lm):
    options = {"num_beams": 4, "n": 4, "max_new_tokens": LENGTH}
    stop = lm.beam_search("the cat", **options)[0].text[3:5]
    found = lm.beam_search("the cat", **options, stop=stop)
    assert all(stop not in each.text for each in found)
    assert {each.finish_reason for each in found} >= {"stop"}
    for each in found:
        assert (each.finish_reason == "stop") == (stop in lm.decode(each.tokens)) and len(each.logp) == len(each.tokens)
    arguments, common = padded(lm, ["the cat"])
    rules = {"no_repeat_ngram": 2, "no_repeat_in": "beam", "diversity_by": "hamming", "diversity_penalty": 0.3}
    found = lm.beam_search("the cat", **options, **rules)
    beams = decoding.beam_search(*arguments, **common, num_beams=4, max_new_tokens=LENGTH, **rules)
    assert [each.tokens for each in found] == [
        row[mask].tolist() for row, mask in zip(*map(np.asarray, (beams.tokens[0], beams.mask[0])), strict=True)
    ]


@pytest.mark.slow
def test_texts_do_not_depend_on_how_many_are_decoded_together(lm):
    """Rows draw by their own index, and mbr's samples too; the last batch is filled up."""
    for how in ({"n": 2}, {"strategy": "mbr", "num_candidates": 2}, {"strategy": "sampled-beam", "num_beams": 2}):
        whole, parts = (
            lm.generate(PROMPTS, seed=3, max_new_tokens=LENGTH, batch_size=size, **how)
            for size in (None, 4 if "n" in how else 2)
        )
        assert [each.tokens for each in whole] == [each.tokens for each in parts]
        assert [each.index for each in whole] == [each.index for each in parts]


@pytest.mark.parametrize(
    "how", [pytest.param({"n": 2, "temperature": 2.0, "seed": 3}, marks=pytest.mark.slow), {"greedy": True}], ids=str
)
def test_many_prompts_in_few_rows_have_the_completions_of_generate(lm, how):
    options = {"max_new_tokens": LENGTH, "stop": ["a", "o"]} | how
    found, whole = lm.generate_many(PROMPTS * 2, rows=2, **options), lm.generate(PROMPTS * 2, **options)
    for ours, theirs in zip(found, whole, strict=True):
        assert (ours.text, ours.tokens, ours.finish_reason) == (theirs.text, theirs.tokens, theirs.finish_reason)
        assert (ours.index, ours.prompt) == (theirs.index, theirs.prompt)
        np.testing.assert_allclose(ours.logp, theirs.logp, atol=1e-4)


def test_a_text_ends_at_eos_a_stop_string_or_the_limit(lm):
    whole = lm.generate("the cat", greedy=True, max_new_tokens=LENGTH)[0]
    assert whole.finish_reason == "length" and len(whole.tokens) == LENGTH
    stop = whole.text[3:5]
    cut = lm.generate("the cat", greedy=True, max_new_tokens=LENGTH, stop=stop)[0]
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(stop)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and stop in lm.decode(cut.tokens)
    ended = lm.generate("the cat", regex=" (sat|mat)", max_new_tokens=8)[0]
    assert ended.finish_reason == "eos" and ended.tokens[-1] in lm.eos_ids and ended.text in (" sat", " mat")
    assert lm.generate("the cat", choices="on", max_new_tokens=8)[0].text == "on", "a single string is one choice"
    written = lm.generate("the cat", json_schema={"type": "boolean"}, max_new_tokens=8)[0]
    assert isinstance(json.loads(written.text), bool)
    nested = lm.generate("the cat", grammar='start: "s" start "t" | "a"', max_new_tokens=8, n=4)
    assert all(re.fullmatch("s*at*", each.text) for each in nested)
    assert all(each.text.count("s") == each.text.count("t") for each in nested if each.finish_reason == "eos")
    assert {each.finish_reason for each in nested} >= {"eos"}
    beams = lm.beam_search("the cat", grammar='start: " sat" | " mat"', num_beams=4, max_new_tokens=8)
    assert {each.text for each in beams} <= {" sat", " mat"} and len({each.text for each in beams}) == len(beams)


@pytest.mark.slow
def test_the_best_of_n_ends_at_stop_strings_and_takes_guidance(lm):
    options = {"strategy": "best-of-n", "num_candidates": 3, "max_new_tokens": LENGTH, "guidance_prompt": "the"}
    prompts, stop = PROMPTS[:2], [*"abcdefghijklmnopqrstuvwxyz0123456789 "]
    found = lm.generate(prompts, stop=stop, **options)

    def score(samples):
        return samples.logp.sum(axis=-1) / samples.mask.sum(axis=-1)

    arguments, common = padded(lm, prompts)
    common |= {"stop": decoding.stop_strings(lm.token_bytes, stop), "max_new_tokens": LENGTH, "score": score}
    guidance = decoding.Guidance([lm.encode("the")] * 2, 1.5)
    expected = decoding.best_of_n(*arguments, n=3, key=jax.random.key(0), guidance=guidance, **common)
    assert [each.tokens for each in found] == rows(expected.generation)
    assert {each.finish_reason for each in found} >= {"stop"} and not any({*each.text} & {*stop} for each in found)


@pytest.mark.slow
def test_the_strategies_that_look_ahead_end_at_stop_strings(lm):
    stop = [*"abcdefghijklmnopqrstuvwxyz0123456789 "]
    plain = lm.generate(PROMPTS, greedy=True, max_new_tokens=LENGTH, stop=stop)
    found = lm.generate(PROMPTS, strategy="contrastive", alpha=0.0, max_new_tokens=LENGTH, stop=stop)
    assert [(each.tokens, each.text, each.finish_reason) for each in found] == [
        (each.tokens, each.text, each.finish_reason) for each in plain
    ]
    found = lm.generate(PROMPTS, strategy="lookup", max_new_tokens=LENGTH, stop=stop)
    assert not any({*each.text} & {*stop} for each in found) and {each.finish_reason for each in found} >= {"stop"}


LETTERS = ["t", *map(chr, range(65, 91))]


@pytest.mark.parametrize(
    "how",
    [
        {"stop": LETTERS},
        pytest.param({"heal": True, "stop": LETTERS, "min_new_tokens": 3}, marks=pytest.mark.slow),
        pytest.param({"guidance_prompt": "the"}, marks=pytest.mark.slow),
        pytest.param({"context": "slide", "max_new_tokens": CONTEXT}, marks=pytest.mark.slow),
    ],
    ids=lambda how: next(iter(how)),
)
def test_mbr_chooses_among_the_samples_of_generate(lm, how):
    """The texts are compared as they are shown: cut at a stop string, without the end of a healed prompt."""
    prompts, options = PROMPTS[:2], {"max_new_tokens": LENGTH, "seed": 2} | how
    found = lm.generate(prompts, strategy="mbr", num_candidates=4, **options)
    samples = lm.generate(prompts, n=4, **options)
    for index, chosen in enumerate(found):
        texts = [each.text for each in samples[4 * index : 4 * index + 4]]
        utilities = [sum(sentence_chrf(one, other) for other in texts) / 4 for one in texts]
        best = samples[4 * index + utilities.index(max(utilities))]
        assert (chosen.text, chosen.tokens, chosen.finish_reason) == (best.text, best.tokens, best.finish_reason)
        assert chosen.details["expected_chrf"] == pytest.approx(max(utilities))
    assert "stop" not in how or "stop" in {each.finish_reason for each in samples}
    if "heal" in how:
        again = lm.generate(prompts, strategy="mbr", num_candidates=4, batch_size=1, **options)
        assert [each.tokens for each in found] == [each.tokens for each in again]


@pytest.mark.slow
def test_stochastic_beams_end_at_stop_strings(lm):
    options = {"strategy": "stochastic-beam", "num_beams": 3, "n": 3, "max_new_tokens": LENGTH}
    found = lm.generate(PROMPTS[:2], stop=LETTERS, **options)
    assert {each.finish_reason for each in found} >= {"stop"}
    assert len({(each.index, *each.tokens) for each in found}) == len(found) == 6
    for each in found:
        whole, before = lm.decode(each.tokens), lm.decode(each.tokens[:-1])
        assert (each.finish_reason == "stop") == any(letter in whole for letter in LETTERS)
        assert each.text == text.trim_at_stop(whole, LETTERS) and text.trim_at_stop(before, LETTERS) == before


HEALED = {"heal": True, "max_new_tokens": LENGTH, "seed": 1}


def assert_healed(lm, prompt, found):
    """The text goes on where the prompt ends, though its last tokens are others."""
    read, taken = lm.tokenizer(prompt)["input_ids"], int(found.details.get("healed", 0))
    assert lm.decode(read[: len(read) - taken] + found.tokens) == prompt + found.text
    return taken


@pytest.mark.slow
def test_healing_writes_the_end_of_the_prompt_again(lm):
    prompts = ["the cat sat on t", "the cat sat on the"]
    found = lm.generate(prompts, n=2, **HEALED)
    assert [assert_healed(lm, prompts[each.index], each) > 0 for each in found] == [True, True, False, False]
    plain = lm.generate(prompts, n=2, max_new_tokens=LENGTH, seed=1)
    assert [one.tokens == other.tokens for one, other in zip(found, plain, strict=True)][2:] == [True, True]


@pytest.mark.slow
def test_healing_is_the_same_in_batches_in_streams_and_in_beams(lm):
    prompts = ["the cat sat on t", "the c", "the cat sat on the"]
    found = lm.generate(prompts, n=2, **HEALED)
    several = [lm.generate(prompts, n=2, batch_size=size, **HEALED) for size in (2, 3)]
    for others in (*several, lm.generate_many(prompts, n=2, rows=2, progress=False, **HEALED)):
        assert [(each.tokens, each.text) for each in others] == [(each.tokens, each.text) for each in found]
    alone = lm.generate(prompts[0], **HEALED)[0]
    stream = lm.stream(prompts[0], **HEALED)
    assert "".join(stream) == alone.text == stream.completion.text
    for beam in lm.beam_search(prompts[0], heal=True, num_beams=3, max_new_tokens=LENGTH):
        assert assert_healed(lm, prompts[0], beam)


@pytest.mark.slow
def test_the_text_that_completes_a_healed_prompt_is_not_searched_and_its_alternatives_follow_the_shortened_prompt():
    lm = jl.load("tiny-gpt2")
    options = {"heal": True, "stop": ["ng"], "max_new_tokens": 4}
    found = lm.generate("And the ki", greedy=True, **options)[0]
    stream = lm.stream("And the ki", greedy=True, **options)
    assert "".join(stream) == found.text == "ng of Israel,"
    many = lm.generate_many(["And the ki"], greedy=True, progress=False, **options)[0]
    for each in (found, stream.completion, many):
        assert (each.text, each.finish_reason) == ("ng of Israel,", "length")
    beam = lm.beam_search("And the ki", num_beams=2, **options)[0]
    assert beam.text.startswith("ng ") and beam.finish_reason == "length"
    every = lm.alternatives("And the ki", found, k=lm.model.vocab_size)
    assert every == lm.alternatives("And the", found.tokens, k=lm.model.vocab_size)
    names = text.token_texts(lm.tokenizer, found.tokens)
    values = [dict(reversed(row))[name] for row, name in zip(every, names, strict=True)]
    np.testing.assert_allclose(values, found.logp, atol=1e-4)


@pytest.mark.slow
def test_a_minimum_length_holds_back_the_stop_in_the_text_too(lm):
    before, after = (lm.tokenizer(each)["input_ids"] for each in ("the cat ", "the cat sat"))
    options = {"transforms": ForcedTokens([*before, *after]), "max_new_tokens": len(before + after), "stop": "cat"}
    assert lm.generate("on", **options, min_new_tokens=1)[0].text == "the "
    held = lm.generate("on", **options, min_new_tokens=len(before) + 1)[0]
    assert held.text == "the cat the " and held.finish_reason == "stop" and len(held.tokens) < len(before + after)
    assert "".join(lm.stream("on", **options, min_new_tokens=len(before) + 1)) == held.text


def test_an_eos_that_is_an_ordinary_token_of_the_tokenizer_is_no_part_of_the_text(lm):
    """A fine-tuned model may end its texts at a token that was added without being made special."""
    request = {"transforms": ForcedTokens([*lm.encode("sat"), end := lm.encode("m")[0]]), "max_new_tokens": 8}
    other = LM(lm.loaded, "one that ends at the token of 'm'")
    vars(other)["eos_ids"] = [end]
    found = other.generate("the cat", **request)[0]
    assert (found.tokens, found.finish_reason, found.text) == ([*lm.encode("sat"), end], "eos", "sat")
    stream = other.stream("the cat", **request)
    assert "".join(stream) == "sat" == stream.completion.text
    vars(other)["eos_ids"] = lm.generate("the cat", greedy=True, max_new_tokens=1)[0].tokens
    assert other.search_tree("the cat", depth=1, branching=1).best == "the cat"


def test_a_control_token_is_a_stop_of_its_own(lm):
    control, number = next(iter(text.control_ids(lm.tokenizer).items()))
    request = {"transforms": ForcedTokens([-1, number]), "max_new_tokens": 4, "seed": 1}
    ended = LM(lm.loaded, "one that does not take it for an EOS")
    vars(ended)["eos_ids"] = []
    found = ended.generate("the cat", stop=control, **request)[0]
    assert found.finish_reason == "stop" and len(found.tokens) == 2 and control not in found.text
    assert len(ended.generate("the cat", **request)[0].tokens) == 4
    with pytest.raises(ValueError, match="must be text, or one control token alone"):
        ended.generate("the cat", stop=control + "x")


@pytest.mark.slow
def test_beams_merge_the_hypotheses_of_one_text(lm):
    options = {"max_new_tokens": 6, "num_beams": 8}
    found = lm.beam_search("the cat", choices=(" sat", " mat"), **options)
    assert len({each.text for each in found}) == len(found) == 2
    assert found[0].log_prob >= found[1].log_prob
    table = decoding.constraints.Constrained(
        decoding.constraints.from_choices([" sat", " mat"], lm.token_bytes), lm.eos_ids
    )
    beams = decoding.beam_search(
        lm.model, lm.params, lm._encoded("the cat")[1], transform=table, eos_id=lm.eos_ids, **options
    )
    spelt = {}
    for tokens, mask, log_prob in zip(beams.tokens[0], beams.mask[0], beams.log_prob[0], strict=True):
        if mask.any():
            spelt.setdefault(lm.decode(tokens[mask].tolist()), []).append(float(log_prob))
    for each in found:
        assert each.log_prob == pytest.approx(np.logaddexp.reduce(spelt[each.text]), abs=1e-4)
    (stopped,) = lm.beam_search("the cat", choices=(" sat", " sad"), stop="s", **options)
    assert (stopped.text, stopped.finish_reason) == (" ", "stop"), "it is the text that is shown"


@pytest.mark.parametrize("prompt", [PROMPTS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in PROMPTS[1:])])
def test_a_stream_is_the_text_of_generate_in_pieces(lm, prompt):
    """With stop strings, of which the first are in no text, so that all share one program."""
    options = {"max_new_tokens": 20, "seed": 3, "temperature": 0.7}
    whole = lm.generate(prompt, stop="~~~~~~~", **options)[0].text
    pieces = list(lm.stream(prompt, stop="~~~~~~~", **options))
    assert "".join(pieces) == whole and len(pieces) > 2 and "~" not in whole
    for stop in ([whole[4:7], "no"], [whole[2:9], whole[5:7]], ["nowhere", "no"], [whole[-1:], "no"]):
        cut = lm.generate(prompt, stop=stop, **options)[0].text
        assert "".join(lm.stream(prompt, stop=stop, **options)) == cut == text.trim_at_stop(whole, stop)


def test_chat_goes_through_the_template(lm):
    rendered = lm.tokenizer("<the cat>", add_special_tokens=False)["input_ids"]
    expected = lm.generate(rendered, greedy=True, max_new_tokens=LENGTH)[0].tokens
    message = {"role": "user", "content": "the cat"}
    for messages in ("the cat", [message]):
        found = lm.chat(messages, strategy="greedy", max_new_tokens=LENGTH)
        assert found.tokens == expected and found.prompt == messages
        assert found.text == lm.decode(expected)
    several = lm.generate([[message], "mat"], chat=True, greedy=True, max_new_tokens=LENGTH)
    assert several[0].tokens == expected and len(several) == 2
    assert "".join(lm.stream([message], chat=True, greedy=True, max_new_tokens=LENGTH)) == lm.decode(expected)


def test_further_transforms_come_last(lm):
    ban = transforms.LogitBias(jnp.where(jnp.arange(270) < 260, 0.0, -jnp.inf))
    found = lm.generate("the cat", max_new_tokens=LENGTH, top_k=9, transforms=[ban])[0]
    arguments, common = padded(lm, ["the cat"])
    chain = transforms.Chain((transforms.TopK(9), ban))
    expected = decoding.generate(*arguments, **common, max_new_tokens=LENGTH, transform=chain, key=jax.random.key(0))
    assert [found.tokens] == rows(expected)
    assert lm.generate("the cat", max_new_tokens=LENGTH, top_k=9, transforms=ban)[0].tokens == found.tokens


def test_guidance_moves_away_from_a_second_prompt(lm):
    found = lm.generate("the cat", greedy=True, guidance_prompt="mat", guidance_scale=3.0, max_new_tokens=LENGTH)
    arguments, common = padded(lm, ["the cat"])
    guidance = decoding.Guidance(jnp.asarray([lm.encode("mat")]), 3.0)
    expected = decoding.generate(*arguments, **common, max_new_tokens=LENGTH, greedy=True, guidance=guidance)
    assert [found[0].tokens] == rows(expected)


@pytest.mark.parametrize("select", first_quick(["nucleus", "best", "sample", "top-k"]))
def test_search_tree_is_the_functional_one(lm, select):
    chosen = {
        "best": "best",
        "sample": transforms.Chain((transforms.Temperature(1.0),)),
        "top-k": transforms.Chain((transforms.Temperature(1.0), transforms.TopK(20))),
        "nucleus": transforms.Chain((transforms.Temperature(1.0), transforms.TopP(0.5))),
    }
    size = {"depth": 3, "branching": 2}
    expected = decoding.search_tree(
        lm.model, lm.params, jnp.asarray(lm.encode("the cat")), **size, select=chosen[select],
        key=jax.random.key(4), eos_id=lm.eos_ids,
    )  # fmt: skip
    found = lm.search_tree("the cat", **size, select=select, seed=4)
    tokens, score = expected.best()
    assert found.best == "the cat" + lm.decode([*lm.encode("the cat"), *tokens])[len("the cat") :]
    assert found.score == pytest.approx(score, rel=1e-5)
    np.testing.assert_array_equal(found.tree.tokens, expected.tokens)
    panels = found.distributions("all")
    assert [int(panel["title"].split(":")[0]) for panel in panels] == sorted({node.parent for node in expected.nodes()})
    (root,) = found.distributions()
    assert root["title"] == panels[0]["title"] == "0: the cat"
    drawn = {each["text"]: each["prob"] for each in root["tokens"] if each["drawn"]}
    first = [node for node in found.described["nodes"] if node["parent"] == 0]
    assert set(drawn) == {node["text"] for node in first}
    assert [drawn[node["text"]] for node in first] == pytest.approx([node["prob"] for node in first], rel=1e-4)
    assert all(token["kept"] for panel in panels for token in panel["tokens"] if token["drawn"])


def test_the_title_of_a_search_tree_names_its_options(lm):
    titles = {
        "most probable, branching 1": {},
        "sampled, branching 1, T = 0.7": {"select": "sample", "temperature": 0.7},
        "top-k, k = 9, branching 1": {"select": "top-k", "top_k": 9},
        "nucleus, p = 0.5, at least 2, branching 1": {"select": "nucleus", "min_tokens_to_keep": 2},
    }
    for title, options in titles.items():
        assert lm.search_tree("the cat", depth=1, branching=1, **options).described["title"] == title


def test_scores_over_all_tokens_are_drawn_as_such(lm):
    for length, per, scale in (
        ("generated", "token", "mean log-probability per token (nats)"),
        ("all", "token, prompt too", "log-probability per token, prompt too (nats)"),
    ):
        figure = lm.search_tree("the cat", depth=1, branching=1, score_length=length).plot()
        assert any(each.get_text().endswith(f" nats per {per})") for each in figure.texts)
        assert figure.axes[1].get_xlabel() == f"score: {scale}"


# Scoring --------------------------------------------------------------------------------------------------------------


def test_log_probs_and_perplexity_of_texts(lm):
    texts = ["the cat sat", "the mat", "on the mat sat the cat"]
    found = lm.log_probs(texts)
    rows = [lm.encode(each) for each in texts]
    padded = np.asarray([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])  # no token sees those after it
    every = jax.jit(functools.partial(scoring.next_token_log_probs, lm.model))(lm.params, padded)
    for written, row, logp, logps in zip(texts, rows, found, every, strict=True):
        expected = logps[: len(row) - 1]
        np.testing.assert_allclose(logp, expected, atol=1e-5)
        np.testing.assert_allclose(lm.log_probs(written), expected, atol=1e-5)
        assert lm.perplexity(written) == pytest.approx(np.exp(-np.mean(expected)), rel=1e-5)
    np.testing.assert_allclose(lm.perplexity(texts), [np.exp(-each.mean()) for each in found], rtol=1e-6)
    assert isinstance(lm.perplexity("the cat"), float) and isinstance(lm.perplexity(["the cat"]), list)


def test_alternatives_are_the_most_probable_tokens_at_each_place(lm, bare):
    found = lm.generate("the cat", greedy=True, max_new_tokens=LENGTH)[0]
    places = lm.alternatives("the cat", found, k=3)
    assert [row[0][0] for row in places] == text.token_texts(lm.tokenizer, found.tokens)
    np.testing.assert_allclose([row[0][1] for row in places], found.logp, atol=1e-5)
    row = lm.encode("the cat") + found.tokens
    every = np.asarray(scoring.next_token_log_probs(lm.model, lm.params, np.asarray([row])))
    assert every.shape[1] == len(row) - 1
    ids = bare.alternatives(lm.encode("the cat"), found.tokens, k=270)
    for place, listed in enumerate(ids):
        values = [logp for _, logp in listed]
        assert sorted(token for token, _ in listed) == list(range(270)) and values == sorted(values, reverse=True)
        assert sum(np.exp(values)) == pytest.approx(1, abs=1e-5)
        assert dict(listed)[found.tokens[place]] == pytest.approx(float(found.logp[place]), abs=1e-5)
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 270\], but is 271"):
        lm.alternatives("the cat", found, k=271)


def test_a_long_prompt_is_refused_or_cut_on_the_named_side(lm):
    ids, most = lm.encode("the cat sat on the mat " * 12), CONTEXT - LENGTH
    with pytest.raises(ValueError, match=f"new ones do not fit with it in the model's context of {CONTEXT}"):
        lm.generate(ids[: most + 1], max_new_tokens=LENGTH)
    options = {"greedy": True, "max_new_tokens": LENGTH}
    for side, kept in (("left", ids[-most:]), ("right", ids[:most])):
        expected = lm.generate(kept, **options)[0].tokens
        assert lm.generate(ids, cut=side, **options)[0].tokens == expected
        assert "".join(lm.stream(ids, cut=side, **options)) == lm.decode(expected)
        assert lm.generate(kept, cut=side, **options)[0].tokens == expected
    for cut, count, said in [("up", 4, "cut must be left or right"), ("left", CONTEXT, "must leave room for a prompt")]:
        with pytest.raises(ValueError, match=said):
            lm.generate(ids, cut=cut, max_new_tokens=count)


@pytest.mark.slow
def test_bans_and_biases_are_of_strings(lm):
    options = {"n": 4, "max_new_tokens": LENGTH, "temperature": 2.0}
    assert any("t" in each.text for each in lm.generate("the cat", **options))
    assert not any("t" in each.text for each in lm.generate("the cat", ban=["t"], **options))
    more = lm.generate("the cat", bias={"at": 50.0}, **options)
    assert [each.tokens for each in more] == [each.tokens for each in lm.generate("the cat", bias="at=50", **options)]
    assert all("at" in each.text for each in more)
    with pytest.raises(TypeError, match="bias must map strings to numbers, but has the key 5: token ids"):
        lm.generate("the cat", bias={5: 1.0})
    with pytest.raises(ValueError, match=r"ban must be empty with choices, but is \['n'\]"):
        lm.generate("the cat", choices=["no"], ban=["n"])
    for control in ({"ban": ["<|endoftext|>"]}, {"bias": {"a<|endoftext|>": 1}}):
        with pytest.raises(ValueError, match=r"ban and bias must be of text, but .* holds the control token"):
            lm.generate("the cat", **control)
    for wrong in ("at", {"at": np.inf}, {"": 1}, "at=x"):
        with pytest.raises(ValueError, match="bias must be of the form TEXT=NUMBER, with a finite number, but is"):
            lm.generate("the cat", bias=wrong)


def test_log_probs_of_completions_given_prompts(lm):
    prompts, completions = ["the cat", "the mat sat"], [" sat", " on the mat"]
    ids = [[lm.encode(each) for each in side] for side in (prompts, completions)]
    expected = scoring.completion_log_probs(lm.model, lm.params, *ids)
    for found in (lm.log_probs(prompts, completions), lm.log_probs(*ids)):
        for logp, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(logp, wanted)
    several = lm.log_probs("the cat", completions)
    assert len(several) == 2
    np.testing.assert_allclose(several[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(lm.log_probs("the cat", " sat"), expected[0], atol=1e-5)


def test_the_enumerable_model_has_the_same_interface(table):
    """A prompt may be empty there, and the first token is scored."""
    sequences = oracle.enumerate_sequences(table.model)
    expected = jax.jit(functools.partial(oracle.sequence_log_probs, table.model))(table.params)
    np.testing.assert_allclose([each.sum() for each in table.log_probs(sequences)], expected, atol=1e-5)
    found = table.generate([[]], max_new_tokens=4, greedy=True)[0]
    assert found.text is None and found.log_prob == pytest.approx(float(table.log_probs(found.tokens).sum()), abs=1e-5)


# Encoder-decoders -----------------------------------------------------------------------------------------------------


SOURCES = ["twenty-one", "three hundred twenty-one"]


def test_an_encoder_decoder_translates(t5):
    expected = translation.translate(t5.loaded, SOURCES)
    assert t5.translate(SOURCES) == expected
    found = t5.generate(SOURCES, greedy=True)
    assert [each.text for each in found] == expected
    assert {each.finish_reason for each in found} == {"eos"}
    scored = t5.log_probs([*SOURCES, SOURCES[0]], [*expected, expected[0]], batch_size=2)
    for logp, completion in zip(scored, [*found, found[0]], strict=True):
        np.testing.assert_allclose(logp, completion.logp, atol=1e-4)


@pytest.mark.slow
def test_an_encoder_decoder_translates_in_every_other_way(t5):
    first, second = translation.translate(t5.loaded, SOURCES)
    assert t5.translate(SOURCES[0]) == first == "".join(t5.stream(SOURCES[0], greedy=True))
    assert t5.beam_search(SOURCES[0], num_beams=2)[0].text == first
    assert t5.search_tree(SOURCES[0], depth=4).best == f"{SOURCES[0]} → {first}"
    assert t5.generate(SOURCES, n=2, seed=1, temperature=0.1)[3].text == second
    assert len(t5.log_probs(SOURCES[0], first)) == len(t5.generate(SOURCES[0], greedy=True)[0].tokens)


# Analysis and figures -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surface(lm):
    return lm.landscape("the cat sat", points=3, radius=0.5, seed=2, progress=False)


def test_figures_are_those_of_the_functions_below_and_show_themselves_once(lm, t5, surface):
    maps = t5.attention("twenty-one", kind="encoder", target="ein-und-zwanzig")
    expected = attention.attention_maps(t5.loaded, "twenty-one", kind="encoder", target="ein-und-zwanzig")
    np.testing.assert_array_equal(maps.weights, expected.weights)
    loss = landscape.next_token_loss(lm.model, jnp.asarray([lm.encode("the cat sat")]))
    axis, directions = np.asarray([-0.5, 0, 0.5]), landscape.random_directions(lm.params, jax.random.key(2))
    losses = landscape.loss_surface(loss, lm.params, directions, axis, axis, progress=False)
    np.testing.assert_array_equal(surface.surface.loss, losses)
    results = (maps, surface, lm.search_tree("the cat", depth=3, branching=2))
    figures = [each.plot() for each in results] + [maps.plot(layer=-1), maps.plot(layer=1, head=0)]
    for figure in figures:
        assert isinstance(figure, Figure)
        png, size = figure._repr_png_()
        assert png.startswith(b"\x89PNG") and set(size) == {"width", "height"}
        assert figure._repr_html_() is None, "or a notebook would have two pictures of it"
    assert not Gcf.get_all_fig_managers(), "or a notebook would show them again at the end of the cell"


def test_a_landscape_of_several_texts_is_that_of_their_tokens(lm):
    texts = ["the cat sat", "on the mat"]
    surface = lm.landscape(texts, points=3, progress=False).surface
    logp = np.concatenate(lm.log_probs(texts))
    assert surface.centre == pytest.approx(-logp.mean(), rel=1e-5) and surface.title == "Loss of 2 texts"


def test_results_print_shortly(lm, t5, bare, surface):
    results = [
        lm, t5, bare, surface,
        *lm.generate("the cat", max_new_tokens=20, seed=3, temperature=0.7),
        bare.generate(lm.encode(PROMPTS), max_new_tokens=LENGTH)[0],
        lm.search_tree("the cat", depth=3, branching=2),
        lm.attention("the cat"),
    ]  # fmt: skip
    for each in results:
        assert "\n" not in repr(each) and len(repr(each)) < 200, repr(each)
    lm_repr = repr(LM(lm.loaded, "small"))
    assert lm_repr == f"LM(small: GPT2, 8.4K parameters, vocabulary 270, context {CONTEXT}, float32)"
    assert re.search("the cat.*…': 1 layers", repr(lm.attention("the cat " * 13))), "a quote ends what is cut"
    completion = results[4]
    assert str(completion) == completion.text and repr(completion).endswith("20 tokens, finish_reason='length')")


# Without a tokenizer, and files ---------------------------------------------------------------------------------------


def test_without_a_tokenizer_ids_come_in_and_go_out(lm, bare):
    ids = lm.encode(PROMPTS)
    expected = lm.generate(ids, max_new_tokens=LENGTH)
    found = bare.generate(ids, max_new_tokens=LENGTH)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    assert {each.text for each in found} == {None} and str(found[0]) == str(found[0].tokens)
    np.testing.assert_array_equal(bare.log_probs(ids[0]), lm.log_probs(ids[0]))
    assert bare.beam_search(ids, max_new_tokens=LENGTH)[0].tokens
    for use in (
        lambda: bare.generate("the cat"),
        lambda: bare.generate(ids, stop=["x"]),
        lambda: bare.generate(ids, regex="x"),
        lambda: bare.generate(ids, strategy="mbr"),
        lambda: bare.chat("the cat"),
        lambda: bare.stream(ids[0]),
        lambda: bare.search_tree(ids[0]),
        lambda: bare.translate("the cat"),
        lambda: bare.attention("the cat"),
        lambda: bare.perplexity("the cat"),
        lambda: bare.encode("the cat"),
        lambda: bare.decode([1]),
    ):
        with pytest.raises(ValueError, match="bare has no tokenizer files"):
            use()


def test_save_and_load_by_path_or_string(lm, tmp_path):
    lm.save(tmp_path / "kept")
    for where in (tmp_path / "kept", str(tmp_path / "kept")):
        kept = jl.load(where)
        found, expected = (each.generate(PROMPTS, max_new_tokens=LENGTH) for each in (kept, lm))
        assert [each.text for each in found] == [each.text for each in expected]
    assert str(jl.load(tmp_path / "kept", dtype="bfloat16").params["wte"]["embedding"].dtype) == "bfloat16"


def test_encode_and_decode_are_inverse(lm):
    assert lm.decode(lm.encode("the cat")) == "the cat"
    assert lm.decode(lm.encode(PROMPTS)) == PROMPTS
    assert lm.decode(np.asarray(lm.encode("the cat"))) == "the cat"
    assert lm.encode("") == [lm.tokenizer.bos_token_id]


# Refusals -------------------------------------------------------------------------------------------------------------

CONVERSATION = [{"role": "user", "content": "hi"}]
FORMS = "must be a string, a list of strings or lists of token ids, but is"


@pytest.mark.parametrize(
    ("error", "said", "use"),
    [
        (TypeError, f"prompts {FORMS} 3.0", lambda lm: lm.generate(3.0)),
        (TypeError, f"prompts {FORMS} None", lambda lm: lm.generate(None)),
        (TypeError, f"prompts {FORMS} a list that holds 0.5", lambda lm: lm.generate(np.asarray([0.5]))),
        (TypeError, f"prompts {FORMS} a list that holds None", lambda lm: lm.generate(["the cat", None])),
        (TypeError, f"prompts {FORMS} a list that holds 1", lambda lm: lm.generate(["the cat", 1])),
        (TypeError, f"texts {FORMS} b'cat'", lambda lm: lm.perplexity(b"cat")),
        (ValueError, f"prompts {FORMS} empty", lambda lm: lm.generate([])),
        (ValueError, "prompt 1 is empty", lambda lm: lm.generate([[3], []])),
        (ValueError, r"prompts must lie in \[0, 270\), the model's vocabulary", lambda lm: lm.generate([3, 999])),
        (ValueError, "the model's context of", lambda lm: lm.generate("q" * 48)),
        (ValueError, "prompt 0 is a conversation.*apply_chat_template", lambda lm: lm.generate(CONVERSATION)),
        (ValueError, "for a chat, but is token ids", lambda lm: lm.generate([1, 2], chat=True)),
        (ValueError, "for a chat, but is empty", lambda lm: lm.chat([])),
        (TypeError, "keyword argument 'top_pp': did you mean 'top_p'", lambda lm: lm.generate("x", top_pp=0.9)),
        (TypeError, "keyword argument 'max_tokens': did you mean", lambda lm: lm.chat("x", max_tokens=9)),
        (TypeError, "keyword argument 'colour'$", lambda lm: lm.search_tree("x", colour=1)),
        (TypeError, "transforms must be logits transforms", lambda lm: lm.generate("x", transforms=[len])),
        (ValueError, "does not use transforms", lambda lm: lm.generate(
            "x", strategy="contrastive", transforms=[transforms.TopK(3)])),
        (ValueError, "strategy must be one of sample, greedy", lambda lm: lm.generate("x", strategy="gredy")),
        (ValueError, "greedy and beam are two strategies", lambda lm: lm.generate("x", strategy="beam", greedy=True)),
        (ValueError, "the strategy greedy does not use temperature, top_p", lambda lm: lm.generate(
            "x", greedy=True, top_p=0.5, temperature=2.0)),
        (ValueError, "the strategy beam does not use diversity_penalty", lambda lm: lm.beam_search(
            "x", diversity_penalty=1.0)),
        (ValueError, "no_repeat_in='beam' needs no_repeat_ngram", lambda lm: lm.beam_search("x", no_repeat_in="beam")),
        (ValueError, "diversity_by='hamming' needs num_groups=1", lambda lm: lm.beam_search(
            "x", num_groups=2, diversity_by="hamming")),
        (ValueError, "the strategy sample does not use num_beams", lambda lm: lm.generate("x", num_beams=2)),
        (ValueError, "choices must hold at least one string", lambda lm: lm.generate("the", choices=[])),
        (ValueError, "n must be 1 for greedy", lambda lm: lm.generate("the", greedy=True, n=2)),
        (ValueError, "min_new_tokens must be at most", lambda lm: lm.generate("x", min_new_tokens=99)),
        (ValueError, "temperature must be a finite number above 0", lambda lm: lm.generate("the", temperature="hot")),
        (ValueError, "seed must be an integer in", lambda lm: lm.generate("the", seed=2**40)),
        (ValueError, "top_k must be an integer of at most 2147483647, but is 4294967296", lambda lm: lm.generate(
            "x", top_k=2**32)),
        (ValueError, "max_new_tokens must be an integer of at most", lambda lm: lm.generate("x", max_new_tokens=2**40)),
        (ValueError, "n must be an integer of at most 2147483647", lambda lm: lm.generate("x", n=2**31)),
        (ValueError, "top_k must be an integer of at most", lambda lm: lm.generate("x", top_k=np.int64(2**40))),
        (ValueError, "top_k must be an integer of at most", lambda lm: lm.generate("x", top_k=np.asarray(2**40))),
        (ValueError, "temperature must be one number", lambda lm: lm.search_tree(
            "x", select="sample", temperature=np.asarray([0.5, 1.0]))),
        (ValueError, "temperature must be one number for all prompts, but is array", lambda lm: lm.generate(
            ["x", "y"], temperature=np.asarray([0.5, 1.0]))),
        (ValueError, "length_penalty must be one number for all prompts", lambda lm: lm.beam_search(
            "x", length_penalty=np.asarray([0.5]))),
        (ValueError, "the conversation must be text in UTF-8, but holds the byte 0xff", lambda lm: lm.chat("\udcff")),
        (ValueError, "path_or_name must be a path or the name of a model, but is ''", lambda lm: jl.load("")),
        (ValueError, "temperature must be a finite number of at most 3.40282e.38 in size, but is 1e.300", lambda lm: (
            lm.generate("x", temperature=1e300))),
        (ValueError, "presence_penalty must be a finite number, but is -inf", lambda lm: lm.generate(
            "x", presence_penalty=-np.inf)),
        (ValueError, "bias must be of the form TEXT=NUMBER, with a finite", lambda lm: lm.generate("x", bias="a=1e40")),
        (ValueError, r"candidates must be an integer in \[1, 270\], but is 300", lambda lm: lm.generate(
            "x", strategy="contrastive", candidates=300)),
        (ValueError, "regex must be nested less deeply", lambda lm: lm.generate("x", regex="(" * 3000 + ")" * 3000)),
        (ValueError, "json_schema must be nested less deeply", lambda lm: lm.generate("x", json_schema='{"a":' * 9999)),
        (ValueError, "grammar must be text in UTF-8, but holds the byte 0xff at character 9", lambda lm: lm.generate(
            "x", grammar='start: "\udcff"')),
        (TypeError, "regex must be a string, but is 5", lambda lm: lm.generate("the", regex=5)),
        (TypeError, "draft_model must be", lambda lm: lm.generate("x", strategy="speculative", draft_model=3)),
        (ValueError, "draft_model must be a decoder-only model", lambda lm: lm.generate(
            "x", strategy="speculative", draft_model="tiny-t5")),
        (ValueError, "n must be an integer of at least 1, but is 0", lambda lm: lm.generate("x", n=0)),
        (ValueError, "batch_size must be an integer of at least 1, but is 0", lambda lm: lm.generate(
            "x", batch_size=0)),
        (ValueError, "num_beams must be an integer of at least 1, but is 0", lambda lm: lm.generate(
            "x", strategy="beam", num_beams=0)),
        (ValueError, "top_p must be a number in .0, 1., but is 0.0", lambda lm: lm.generate("x", top_p=0.0)),
        (ValueError, "num_beams must be at least the 9 completions asked for, but is 4", lambda lm: lm.generate(
            "x", strategy="beam", n=9)),
        (ValueError, "needs draft_model", lambda lm: lm.generate("x", strategy="speculative")),
        (ValueError, "give either regex or choices", lambda lm: lm.generate("x", regex="a", choices=["b"])),
        (ValueError, "give either choices or json_schema", lambda lm: lm.generate("x", choices=["b"], json_schema={})),
        (ValueError, "the JSON schema has the keyword 'x'", lambda lm: lm.generate("x", json_schema={"x": 1})),
        (ValueError, "context must be refuse or slide, but is 'grow'", lambda lm: lm.generate("x", context="grow")),
        (ValueError, "slides does not go with cut", lambda lm: lm.generate("x", context="slide", cut="left")),
        (ValueError, "generate_many does not use context", lambda lm: lm.generate_many("x", context="slide")),
        (ValueError, "beam does not use context", lambda lm: lm.beam_search("x", context="slide")),
        (ValueError, "min_new_tokens must be left out with choices, but is 9", lambda lm: lm.generate(
            "x", choices=["a"], min_new_tokens=9)),
        (TypeError, "ban must be a string or several, but is 3", lambda lm: lm.generate("x", ban=3)),
        (TypeError, "stop must be a string or several, but is None", lambda lm: lm.generate("x", stop=None)),
        (TypeError, "bias must be strings of the form TEXT=NUMBER, .* but is 3", lambda lm: lm.generate("x", bias=3)),
        (ValueError, "heal does not go with regex", lambda lm: lm.generate("x", heal=True, regex="a")),
        (ValueError, "heal does not go with ban", lambda lm: lm.generate("x", heal=True, ban="a")),
        (ValueError, "a chat does not use heal", lambda lm: jl.Chat(lm, heal=True)),
        (ValueError, "the strategy best-of-n does not use heal", lambda lm: lm.generate(
            "x", heal=True, strategy="best-of-n")),
        (ValueError, "give either regex or grammar", lambda lm: lm.generate("x", regex="a", grammar="start: x")),
        (ValueError, "grammar must be in llguidance's Lark syntax, but is not", lambda lm: lm.generate(
            "x", grammar='x: "a"' * 999)),
        (ValueError, "grammar must be in llguidance's Lark syntax", lambda lm: lm.generate("x", grammar="?start: foo")),
        (ValueError, "grammar must be Lark text with a rule start, or the path of its file, but is '': Is a directory",
            lambda lm: lm.generate("x", grammar="")),
        (ValueError, "or the path of its file, but is 'x.lark': No such file", lambda lm: lm.generate(
            "x", grammar="x.lark")),
        (ValueError, "json_schema must be a JSON schema, or the path of its file, but is '.': Is a directory",
            lambda lm: lm.generate("x", json_schema=".")),
        (ValueError, "json_schema must be JSON, but '{]' is not: ", lambda lm: lm.generate("x", json_schema="{]")),
        (ValueError, "the JSON schema has the keyword 'x'", lambda lm: lm.generate("x", json_schema='{"x": 1}')),
        (TypeError, "grammar must be a grammar in Lark", lambda lm: lm.generate("x", grammar=5)),
        (TypeError, "json_schema must be a JSON schema as a mapping", lambda lm: lm.generate("x", json_schema=5)),
        (ValueError, "guidance_scale needs guidance_prompt", lambda lm: lm.generate("x", guidance_scale=2.0)),
        (ValueError, "stop must be strings that are not empty", lambda lm: lm.generate("x", stop=[""])),
        (ValueError, "max_new_tokens must be an integer of at", lambda lm: lm.generate("x", max_new_tokens=0)),
        (ValueError, "temperature must be a finite number above 0", lambda lm: lm.generate("x", temperature=0.0)),
        (ValueError, "rows must be an integer of at least 1, but is 0", lambda lm: lm.generate_many("x", rows=0)),
        (ValueError, "n must be 1 for greedy", lambda lm: lm.generate_many("x", greedy=True, n=2)),
        (TypeError, r"'strategy': it samples, .* greedy=True; generate has", lambda lm: lm.generate_many(
            "x", strategy="beam")),
        (TypeError, r"'num_beams': generate\(..., strategy='beam', batch_size", lambda lm: lm.generate_many(
            "x", num_beams=2)),
        (TypeError, "'batch_size': rows is the number of completions", lambda lm: lm.generate_many("x", batch_size=2)),
        (ValueError, r"the model's context of .*the option cut, --cut left.*--context slide", lambda lm: lm.generate(
            "x", max_new_tokens=500)),
        (TypeError, r"completion must be a Completion, a text or token ids, but is \['a'\]", lambda lm: lm.alternatives(
            "x", ["a"])),
        (TypeError, "completion must be a Completion, a text or token ids, but is None", lambda lm: lm.alternatives(
            "x", None)),
        (ValueError, "generate_many does not use guidance_prompt", lambda lm: lm.generate_many(
            "x", guidance_prompt="y")),
        (ValueError, "stream takes one prompt, but is given 2", lambda lm: lm.stream(["x", "y"])),
        (ValueError, "search_tree takes one prompt, but is given 2", lambda lm: lm.search_tree(["x", "y"])),
        (ValueError, "select must be one of best, sample", lambda lm: lm.search_tree("x", select="top")),
        (ValueError, "the selection best does not use top_k", lambda lm: lm.search_tree("x", top_k=3)),
        (ValueError, "the selection top-k does not use top_p", lambda lm: lm.search_tree(
            "x", select="top-k", top_p=0.5)),
        (ValueError, "min_tokens_to_keep needs top_p", lambda lm: lm.generate("x", min_tokens_to_keep=2)),
        (ValueError, "temperature is for children that are drawn", lambda lm: lm.search_tree("x", temperature=2.0)),
        (ValueError, "text 0 has too few tokens", lambda lm: lm.log_probs("")),
        (ValueError, "there are 3 for 2", lambda lm: lm.log_probs(["x", "y"], ["a", "b", "c"])),
        (ValueError, "points must be at least 2", lambda lm: lm.landscape("the cat", points=1)),
        (ValueError, "layer must be from 0 to 0", lambda lm: lm.attention("the cat").plot(layer=4)),
        (TypeError, "sentence 2 must be a string, but is 5", lambda lm: lm.translate(["the cat", 5])),
        (ValueError, r"a node must be in \[0, 3\], but is '0'", lambda lm: lm.search_tree(
            "the cat", depth=3, branching=1).plot_bars("0")),
        (ValueError, "directions must be one of parameter, filter, none, hessian, but is 'random'", lambda lm:
            lm.landscape("the cat", directions="random")),
        (ValueError, "a text must have at least two tokens, for otherwise there is nothing to predict", lambda lm:
            lm.landscape("x")),
        (ValueError, "kind must be one of self for this model", lambda lm: lm.attention("the cat", kind="cross")),
        (TypeError, "layer must be an integer, but is '0'", lambda lm: lm.attention("the cat").plot(layer="0")),
        (TypeError, r"the text must be a string, but is \['the cat'\]", lambda lm: lm.attention(["the cat"])),
        (TypeError, "sentence 1 must be a string, but is None", lambda lm: lm.translate(None)),
        (ValueError, "directions must be one of parameter, filter, none, hessian, but is 'x'", lambda lm: lm.landscape(
            "the cat", directions="x")),
        (ValueError, "the strategy sample does not use num_beams: strategy='beam' does", lambda lm: lm.generate(
            "x", num_beams=4)),
        (ValueError, "the strategy greedy does not use num_candidates", lambda lm: lm.generate(
            "x", greedy=True, num_candidates=8)),
        (TypeError, "greedy must be True or False, but is 'no'", lambda lm: lm.generate("x", greedy="no")),
        (ValueError, r"prompt 0 has \d+ tokens, and 3 new ones do not fit", lambda lm: lm.generate(
            "the cat " * 99, max_new_tokens=3)),
        (ValueError, "completion 1 is empty", lambda lm: lm.log_probs("x", ["the cat", ""])),
        (ValueError, r"text 0 has \d+ tokens, which do not fit", lambda lm: lm.perplexity(
            ["the cat " * 99, "the cat"])),
        (TypeError, "the prompt must be a string, but is None", lambda lm: lm.encode(None)),
        (TypeError, "the prompt must be a string, but is None", lambda lm: lm.encode(["the cat", None])),
        (TypeError, "tokens must be .*, but is None", lambda lm: lm.decode(None)),
        (TypeError, "tokens must be token ids, but are 'the'", lambda lm: lm.decode("the")),
        (ValueError, r"tokens must lie in \[0, 270\), the .* but range from -1 to 2", lambda lm: lm.decode([-1, 2])),
        (ValueError, "tokens must lie in .* but range from 1 to 270", lambda lm: lm.decode([[1], [1, 270]])),
    ],
)  # fmt: skip
def test_refusals(lm, error, said, use):
    with pytest.raises(error, match=said):
        use(lm)


def test_numbers_of_any_type_are_options(recwarn):
    for kind in (np.float16, np.float32, np.float64, jnp.float32, jnp.bfloat16, jnp.asarray):
        decoding_options.Sampling(temperature=kind(0.7))
    for kind in (np.int8, np.uint8, np.int64, jnp.int32, jnp.uint8):
        decoding_options.Sampling(seed=kind(3), top_k=kind(3), max_new_tokens=kind(3))
    assert not recwarn.list


@pytest.mark.parametrize("name", ["regex", "guidance_prompt", "choices", "stop", "ban", "bias"])
def test_stray_bytes_in_texts_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be text in UTF-8, but holds the byte 0xff at character 2"):
        decoding_options.Sampling(**{name: "a\udcff=1"})


@pytest.mark.parametrize(
    ("said", "use"),
    [
        ("prompt 0, 'hello': the model's tokenizer does not know 'hello'", lambda t5: t5.generate("hello")),
        ("an encoder-decoder has no chat template", lambda t5: t5.chat("one")),
        ("generate_many is for decoder-only models", lambda t5: t5.generate_many("one")),
        ("guidance_prompt is for decoder-only models", lambda t5: t5.generate("one", guidance_prompt="two")),
        ("an encoder-decoder scores completions given texts", lambda t5: t5.perplexity("one")),
        ("completion 1, 'hello'", lambda t5: t5.log_probs("one", ["eins", "hello"])),
        ("heal is for decoder-only models", lambda t5: t5.generate("one", heal=True)),
        ("landscape needs a model of one text", lambda t5: t5.landscape("one")),
    ],
)
def test_refusals_of_an_encoder_decoder(t5, said, use):
    with pytest.raises(ValueError, match=said):
        use(t5)


def test_a_model_without_a_template_does_not_chat(t5, lm):
    tokenizer = type(lm.tokenizer)(tokenizer_object=lm.tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    plain = LM(models.Loaded(lm.model, lm.params, tokenizer, lm.config))
    with pytest.raises(ValueError, match="this model has no chat template"):
        plain.chat("the cat")

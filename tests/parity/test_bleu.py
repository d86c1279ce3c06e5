"""BLEU and chrF against sacreBLEU, live; run by `make parity`."""

import unicodedata
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from jaxrl_llm.analysis import bleu, chrf
from jaxrl_llm.analysis.bootstrap import bleu_interval, chrf_interval
from jaxrl_llm.data import verses
from tests.goldens import make_bleu_goldens as goldens

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::jaxrl_llm.analysis.bleu.TooShortForBleu")]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", range(10))
def test_random_corpora_score_the_same(seed):
    rng, nonzero = np.random.default_rng([seed, 23]), 0
    for _ in range(100):
        hypotheses, references = goldens.random_corpus(rng)
        references = goldens.ragged(rng, references) if rng.random() < 0.3 else references
        options = goldens.random_options(rng)
        expected = goldens.scores_of_sacrebleu(hypotheses, references, *options)
        ours = (
            bleu.corpus_bleu(hypotheses, references, **options[0]),
            bleu.corpus_chrf(hypotheses, references, **options[1]),
        )
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6, err_msg=f"{hypotheses} {references} {options}")
        nonzero += expected[0] > 0
    assert nonzero > 20


@pytest.mark.parametrize("name", ["README.md", "docs/theory.md", "LICENSE"])
def test_lines_of_a_document_score_the_same(name):
    rng = np.random.default_rng(5)
    references = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.strip()]
    hypotheses = [goldens.perturbed(rng, line) for line in references]
    several = [[line, goldens.perturbed(rng, line)] for line in references]
    single = [[line] for line in references]
    for lists, ours in ((single, references), (several, several)):
        expected = goldens.scores_of_sacrebleu(hypotheses, lists, {}, {"word_order": 2})
        actual = bleu.corpus_bleu(hypotheses, ours), bleu.corpus_chrf(hypotheses, ours, word_order=2)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
        assert 30 < expected[0] < 99


@pytest.mark.parametrize("side", ["english", "spanish"])
def test_verses_score_the_same(side):
    """Hypotheses are the verses with words lost, doubled and replaced; second references another such text."""
    rng = np.random.default_rng(8)
    verses_of_test = [getattr(pair, side) for pair in verses.split(verses.load()).test]
    hypotheses = [goldens.perturbed(rng, verse) for verse in verses_of_test]
    several = goldens.ragged(rng, [[verse, goldens.perturbed(rng, verse)] for verse in verses_of_test])
    for lists in ([[verse] for verse in verses_of_test], several):
        for options in ({}, {"tokenize": "none", "smoothing": "floor"}):
            expected = goldens.scores_of_sacrebleu(hypotheses, lists, options, {"word_order": len(options)})
            actual = (
                bleu.corpus_bleu(hypotheses, lists, **options),
                bleu.corpus_chrf(hypotheses, lists, word_order=len(options)),
            )
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
            assert 30 < expected[0] < 99


@pytest.mark.parametrize("tokenize", get_args(bleu.Tokenizer))
def test_texts_of_all_scripts_have_the_same_tokens_and_score_the_same(tokenize):
    """Of the characters that Python's Unicode knows."""
    from sacrebleu.metrics import BLEU

    rng = np.random.default_rng(7)
    ranges = (range(0x20, 0x250), range(0x600, 0x700), range(0x1F00, 0x3400), range(0x3400, 0xA000, 7))
    ranges += (range(0xF900, 0x10000), range(0x1F300, 0x1F700), range(0x20000, 0x2FA20, 5))
    every = [chr(code) for each in ranges for code in each if unicodedata.category(chr(code)) != "Cn"]
    theirs = BLEU(tokenize=tokenize, force=True)

    def sentence() -> str:
        kinds = [every, list("aB1 2.,-;!?'&\n "), list("今天，。你好3"), goldens.PIECES]
        return "".join(str(rng.choice(kinds[kind])) for kind in rng.choice(4, rng.integers(0, 30)))

    texts = [sentence() for _ in range(2000)]
    for text in texts:
        assert bleu.tokenise(text, tokenize) == theirs.tokenizer(text.rstrip()).split(), ascii(text)
    hypotheses = [goldens.perturbed(rng, text) for text in texts]
    expected = theirs.corpus_score(hypotheses, [texts]).score
    assert bleu.corpus_bleu(hypotheses, texts, tokenize=tokenize) == pytest.approx(expected, abs=1e-6)
    assert 20 < expected < 99


def test_bootstrap_intervals_are_as_wide():
    """sacreBLEU gives half the width of its interval, of other random draws."""
    from sacrebleu.metrics import BLEU, CHRF

    rng = np.random.default_rng(9)
    references = [pair.spanish for pair in verses.split(verses.load()).test[:200]]
    hypotheses = [goldens.perturbed(rng, verse) for verse in references]
    for metric, interval in ((BLEU(), bleu_interval), (CHRF(), chrf_interval)):
        theirs = metric.corpus_score(hypotheses, [references], n_bootstrap=2000)
        ours = interval(hypotheses, references, seed=0, resamples=2000)
        assert ours.estimate == pytest.approx(theirs.score, abs=1e-6)
        assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, rel=0.1)


def test_single_sentences_score_the_same():
    import sacrebleu

    rng = np.random.default_rng(6)
    for _ in range(300):
        (hypothesis, *_), (references, *_) = goldens.random_corpus(rng)
        expected = sacrebleu.sentence_bleu(hypothesis, references), sacrebleu.sentence_chrf(hypothesis, references)
        actual = bleu.sentence_bleu(hypothesis, references), chrf.sentence_chrf(hypothesis, references)
        np.testing.assert_allclose(actual, [each.score for each in expected], rtol=0, atol=1e-6)

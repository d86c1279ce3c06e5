"""BLEU and chrF against sacreBLEU, live; run by `make parity`."""

from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.analysis import bleu
from tests.goldens import make_bleu_goldens as goldens

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("seed", range(10))
def test_random_corpora_score_the_same(seed):
    rng, nonzero = np.random.default_rng([seed, 23]), 0
    for _ in range(100):
        hypotheses, references = goldens.random_corpus(rng)
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


def test_single_sentences_score_the_same():
    import sacrebleu

    rng = np.random.default_rng(6)
    for _ in range(300):
        (hypothesis, *_), (references, *_) = goldens.random_corpus(rng)
        expected = sacrebleu.sentence_bleu(hypothesis, references), sacrebleu.sentence_chrf(hypothesis, references)
        actual = bleu.sentence_bleu(hypothesis, references), bleu.sentence_chrf(hypothesis, references)
        np.testing.assert_allclose(actual, [each.score for each in expected], rtol=0, atol=1e-6)

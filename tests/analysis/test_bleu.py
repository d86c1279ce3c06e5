import json
import math
import warnings
from collections import Counter
from pathlib import Path

import pytest

from jaxrl_llm.analysis import bleu, chrf
from jaxrl_llm.analysis.bleu import corpus_bleu, corpus_chrf, sentence_bleu
from jaxrl_llm.analysis.chrf import sentence_chrf

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "bleu.json").read_text(encoding="utf-8"))
CAT = "the cat is on the mat"
CORPUS = ["It is a guide to action.", "the dog, the cat: 1,000 of them - here", "Nothing else matters much to me."]


# sacreBLEU's numbers (tests/goldens/make_bleu_goldens.py) -------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::jaxrl_llm.analysis.bleu.TooShortForBleu")
@pytest.mark.parametrize("case", GOLDENS, ids=range(len(GOLDENS)))
def test_scores_are_those_of_sacrebleu(case):
    texts = case["hypotheses"], case["references"]
    assert corpus_bleu(*texts, **case["bleu_options"]) == pytest.approx(case["bleu"], abs=1e-9)
    assert corpus_chrf(*texts, **case["chrf_options"]) == pytest.approx(case["chrf"], abs=1e-9)


def test_the_goldens_try_what_they_should():
    assert sum(case["bleu"] > 0 for case in GOLDENS) > 30
    assert sum(not case["bleu_options"] and case["bleu"] > 0 for case in GOLDENS) >= 5
    used = Counter((name, value) for case in GOLDENS for name, value in case["bleu_options"].items())
    assert all(used["smoothing", each] >= 3 for each in ("exp", "floor", "add-k", "none"))
    assert all(used[name, True] >= 3 for name in ("lowercase", "effective_order")) and used["tokenize", "none"] >= 3
    assert any(len(case["references"][0]) > 1 for case in GOLDENS)
    assert sum(len({len(each) for each in case["references"]}) > 1 and case["bleu"] > 0 for case in GOLDENS) >= 3


# Facts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [corpus_bleu, corpus_chrf])
def test_identical_corpora_score_100_and_strangers_0(score):
    assert score(CORPUS, CORPUS) == pytest.approx(100)
    assert score(CORPUS, [[other, same] for other, same in zip(CORPUS[::-1], CORPUS, strict=True)]) == pytest.approx(
        100
    )
    assert score(["aa bb", "cc"], ["xx yy", "zz"]) == 0


def test_a_match_is_clipped_to_the_reference_that_has_most_of_it():
    flood = "the the the the the the the"
    assert corpus_bleu([flood], [CAT], max_order=1) == pytest.approx(100 * 2 / 7)
    longer = [CAT, "there is a cat on the mat", "the the the of three other words"]
    assert corpus_bleu([flood], [longer], max_order=1) == pytest.approx(100 * 3 / 7)


@pytest.mark.parametrize("score", [corpus_bleu, corpus_chrf])
def test_nothing_scores_nothing(score):
    assert score([""], [CAT]) == score(["", " \n"], [CAT, CAT]) == score([""], [""]) == score([CAT], [""]) == 0
    assert score([], []) == 0
    assert 0 < score(["", CAT], [CAT, CAT]) < 100


def test_an_eps_smoothed_nothing_is_nearly_nothing():
    assert corpus_chrf([""], [CAT], eps_smoothing=True) == 0 < corpus_chrf([""], [""], eps_smoothing=True) < 1e-13


def test_bleu_by_hand():
    """Unigrams 5/6, bigrams 3/5, trigrams 1/4, 4-grams 0/3, which counts as half a match: 1/6; no penalty."""
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    hypothesis = "the cat sat on the mat"
    assert corpus_bleu([hypothesis], [CAT]) == pytest.approx(expected)
    assert corpus_bleu([hypothesis], [CAT], smoothing="none") == 0
    floored = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.1 / 3) ** 0.25
    assert corpus_bleu([hypothesis], [CAT], smoothing="floor") == pytest.approx(floored)
    added = 100 * (5 / 6 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert corpus_bleu([hypothesis], [CAT], smoothing="add-k") == pytest.approx(added)


def test_counts_are_summed_over_the_corpus_before_the_ratio():
    hypotheses, references = ["a b c d", "e"], ["a b x y", "e"]
    assert corpus_bleu(hypotheses, references, max_order=1) == pytest.approx(100 * 3 / 5)  # and not (2/4 + 1/1) / 2
    hypotheses, references = ["a b c d e f", "g"], ["a b c d", "g h i"]
    assert corpus_bleu(hypotheses, references, max_order=1) == pytest.approx(100 * 5 / 7)  # 7 tokens against 7


@pytest.mark.parametrize(
    ("lengths", "closest"), [((5, 9), 5), ((6, 8), 6), ((8, 6), 6), ((3, 20), 3), ((20, 8, 9), 8), ((7, 6), 7)]
)
def test_brevity_is_measured_against_the_closest_reference(lengths, closest):
    assert bleu.closest(7, lengths) == closest
    references = [" ".join("abcdefghijklmnopqrstuvwxyz"[:length]) for length in lengths]
    penalty = min(1, math.exp(1 - closest / 7))
    matches = min(7, max(lengths))
    assert corpus_bleu(["a b c d e f g"], [references], max_order=1) == pytest.approx(100 * penalty * matches / 7)


def test_a_short_text_is_scored_by_the_orders_that_it_has():
    assert corpus_bleu(["a cat"], ["a cat"], effective_order=True) == pytest.approx(100)
    assert sentence_bleu("a cat", "a cat") == pytest.approx(100)
    assert sentence_bleu("a dog", ["a cat", "a dog"]) == pytest.approx(100)
    assert sentence_bleu(CORPUS[0], CORPUS[2]) == corpus_bleu([CORPUS[0]], [CORPUS[2]])


def test_case_matters_unless_told():
    for score in (corpus_bleu, corpus_chrf):
        assert score([CAT.upper()], [CAT]) == 0
        assert score([CAT.upper()], [CAT], lowercase=True) == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's 1,000.50 here, not 5.", "It's 1,000.50 here , not 5 ."),
        ("well-known, 3-4 (or so)?", "well-known , 3 - 4 ( or so ) ?"),
        ("&quot;A &amp; B&quot; &lt;b&gt;", '" A & B " < b >'),
        ("line-\nbreak and\nline <skipped>end  ", "linebreak and line end"),
        ("a..b ,5 x.y", "a . . b , 5 x . y"),
        ("", ""),
    ],
)
def test_tokens_of_mteval_13a(text, tokens):
    assert bleu.tokenise(text) == tokens.split()
    assert bleu.tokenise(text, "none") == text.split()


@pytest.mark.parametrize(
    ("tokenize", "text", "tokens"),
    [  # checked against sacreBLEU 2.6
        ("intl", "„Ja“, 1,000.5 km – 3€ (or 5%)?\n", "„ Ja “ , 1,000.5 km – 3 € ( or 5 % ) ?"),
        ("intl", "&quot;x&quot; a.b 2.x, in 1990. ", "& quot ; x & quot ; a . b 2 . x , in 1990."),
        ("zh", "今天，是2024年。abc-d, 1,000 “好”に", "今 天 ， 是 2024 年 。 abc-d , 1,000 “ 好 ” に"),
        ("zh", " <skipped>㐀龻 3-4.", "< skipped > 㐀 龻 3 - 4."),
        ("char", "ab 今\u00a0c\n.", "a b 今 c ."),
    ],
)
def test_tokens_of_other_languages(tokenize, text, tokens):
    assert bleu.tokenise(text, tokenize) == tokens.split()


def test_a_corpus_that_is_too_short_for_bleu_says_so():
    short = (["sieben", "neun"], ["sieben", "neun"])
    with pytest.warns(bleu.TooShortForBleu, match="no hypothesis has 4 tokens"):
        assert corpus_bleu(*short) == 0
    counts = bleu.summed(bleu.count(*short))
    assert counts.too_short and counts == ([2, 0, 0, 0], [2, 0, 0, 0], 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert corpus_bleu(*short, tokenize="char") == pytest.approx(100)
        assert corpus_bleu(*short, max_order=1) == corpus_bleu(*short, effective_order=True) == pytest.approx(100)
        assert corpus_bleu(*short, smoothing="add-k") > 0
        assert corpus_bleu(["acht"], ["neun"]) == corpus_bleu(["a b c x"], ["d e f g"]) == corpus_bleu([], []) == 0


def test_chrf_by_hand():
    """Of "abc" and "abd" 2 of 3 characters and 1 of 2 pairs agree; order 3 exists and agrees nowhere."""
    assert sentence_chrf("abc", "abd", char_order=2) == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert sentence_chrf("abc", "abd") == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)  # orders 4 to 6 do not exist
    precision, recall = 3 / 4, 3 / 3
    assert sentence_chrf("abcx", "abc", char_order=1) == pytest.approx(100 * 5 * precision * recall / (4 * 0.75 + 1))
    assert sentence_chrf("abcx", "abc", char_order=1, beta=0) == pytest.approx(100 * precision)
    assert sentence_chrf("abcx", "abc", char_order=1, beta=1e6) == pytest.approx(100 * recall)


def test_whitespace_is_no_character_and_words_count_when_asked():
    assert sentence_chrf("a b  c", "ab c") == pytest.approx(100)
    assert sentence_chrf("a b  c", "ab c", word_order=1) < 100
    marks = [chrf._without_punctuation(word) for word in ("cat.", "(cat", "(cat)", "c", ".", "it's")]
    assert marks == [("cat", "."), ("(", "cat"), ("(cat", ")"), ("c",), (".",), ("it's",)]


def test_chrf_takes_the_best_of_several_references():
    scores = [sentence_chrf(CORPUS[0], each) for each in CORPUS]
    assert sentence_chrf(CORPUS[0], CORPUS[1:]) == max(scores[1:]) < sentence_chrf(CORPUS[0], CORPUS) == scores[0]
    assert len(set(scores)) == 3


@pytest.mark.parametrize("score", [corpus_bleu, corpus_chrf])
def test_mistakes_are_named(score):
    for texts, message in [
        ((CAT, [CAT]), "hypotheses must be a list of texts, but is one text"),
        (([CAT], CAT), "references must be a list of texts, but is one text"),
        (([CAT], [CAT, CAT]), "each of 1 hypotheses, but there are 2"),
        (([CAT, CAT], [[CAT, CAT]]), "each of 2 hypotheses, but there are 1"),
        (([CAT, CAT], [CAT, []]), "hypothesis 1 has no reference"),
        (([CAT, None], [CAT, CAT]), "row 1 holds None"),
        (([CAT], [[CAT, 3]]), "row 0 holds 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            score(*texts)


@pytest.mark.parametrize(
    ("score", "options", "message"),
    [
        (corpus_bleu, {"smoothing": "laplace"}, "smoothing must be one of exp, none, floor, add-k, but is 'laplace'"),
        (corpus_bleu, {"smooth_value": 1.0}, "'exp' has none"),
        (corpus_bleu, {"smoothing": "floor", "smooth_value": -1.0}, "smooth_value must be finite and not negative"),
        (corpus_bleu, {"tokenize": "ja"}, "tokenize must be one of 13a, intl, char, zh, none, but is 'ja'"),
        (corpus_bleu, {"max_order": 0}, "max_order must be at least 1, but is 0"),
        (corpus_chrf, {"char_order": 0}, "not both 0"),
        (corpus_chrf, {"word_order": -1}, "must be counts"),
        (corpus_chrf, {"beta": -1.0}, "beta must be finite and not negative"),
        (corpus_chrf, {"beta": math.nan}, "beta must be finite and not negative"),
    ],
)
def test_unknown_options_are_named(score, options, message):
    with pytest.raises(ValueError, match=message):
        score([CAT], [CAT], **options)

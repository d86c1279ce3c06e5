"""Questions as tokens, and log-probabilities of their answers."""

from typing import ClassVar

import numpy as np
import pytest
import tokenizers
import transformers

from jaxrl_llm.analysis.sycophancy import ModelSource, facts
from jaxrl_llm.analysis.sycophancy.probes import conversations
from jaxrl_llm.analysis.sycophancy.questions import Asked, Item
from jaxrl_llm.analysis.sycophancy.scoring import against_others, answered_row, encode, label_tokens
from jaxrl_llm.models.gpt2 import GPT2
from jaxrl_llm.scoring import PREFIX_BUCKET, Choices, Reading, answer_log_probs, groups_of
from tests.analysis.sycophancy.conftest import CONTEXT, TEMPLATE, logits_of, tokenizer
from tests.conftest import log_softmax


@pytest.fixture(scope="module")
def rows(loaded):
    rng = np.random.default_rng(1)
    lengths = [(5, (1, 1)), (40, (1, 3)), (23, (2, 4)), (64, (1, 1)), (65, (4, 2)), (9, (1, 2)), (33, (3, 3))]
    drawn = [
        Choices(rng.integers(0, 300, given).tolist(), [rng.integers(0, 300, length).tolist() for length in answers])
        for given, answers in lengths
    ]
    # Questions that begin alike: two in two orders, and one that another one continues.
    alike = [Choices([*drawn[1].given[:30], *given], drawn[2].answers) for given in ([1, 2, 3], [3, 2, 1], [1], [1, 2])]
    # Two that share more than a bucket and come with their answers to the whole context.
    shared = rng.integers(0, 300, PREFIX_BUCKET + 2).tolist()
    edge = [Choices([*shared, *rng.integers(0, 300, CONTEXT - 2 - len(shared))], [[1, 2, 3], [4]]) for _ in range(2)]
    return [*drawn, *alike, Choices(drawn[5].given, [[5], [6, 7]]), Choices([7], [[5], [6]]), *edge]


def test_questions_that_begin_alike_are_grouped(rows):
    readings = {Reading((*row.given, *each[:-1]), len(each)) for row in rows for each in row.answers}
    groups = groups_of(readings)
    assert sorted(each for group in groups for each in group.readings) == sorted(readings)
    assert sorted(len(group.readings) for group in groups) == [1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 4], "four at most"
    assert max(row.length for row in rows) == CONTEXT and max(group.shared for group in groups) > PREFIX_BUCKET
    for shared, together in groups:
        assert len({each.read[:shared] for each in together}) == 1
        assert all(len(each.read) - each.length >= shared for each in together), "the last of them predicts an answer"


@pytest.fixture(scope="module")
def together(loaded, rows):
    return answer_log_probs(loaded.model, loaded.params, rows, progress=False)


def test_answers_have_the_log_probability_of_their_tokens(loaded, rows, together):
    """Of each answer behind its question, without cache or batch."""
    answered = [(row.given, answer) for row in rows for answer in row.answers]
    logp = log_softmax(logits_of(loaded, [[*given, *answer] for given, answer in answered]))
    sums = [
        each[np.arange(len(answer)) + len(given) - 1, answer].sum()
        for each, (given, answer) in zip(logp, answered, strict=True)
    ]
    np.testing.assert_allclose(np.ravel(together), sums, atol=2e-4)


def assert_alike(scores, together):
    for one, other in zip(scores, together, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_neither_batch_nor_padding_changes_them(loaded, rows, together):
    some = rows[-3::-1]  # without the longest, for which other programs would be compiled
    apart = answer_log_probs(loaded.model, loaded.params, some, batch_size=1, progress=False)
    assert_alike(apart[::-1], together[:-2])


def test_rows_may_have_different_numbers_of_answers(loaded, rows, together):
    """The others of an item add up."""
    three = rows[0]._replace(answers=[*rows[0].answers, *rows[3].answers[:1]])
    found = answer_log_probs(loaded.model, loaded.params, [three, rows[3]], progress=False)
    assert_alike([found[0][:2], found[1]], [together[0], together[3]])
    long = Choices([1] * (CONTEXT + 1), [[1], [2], [3]])
    short, unread = ModelSource(loaded, progress=False).log_probs([three, long])
    assert_alike([short], found[:1])
    assert len(unread) == 3 and np.isnan(unread).all(), "too long"
    item = Item("Which?\n (A) a\n (B) b\n (C) c\n", " (B)", (" (A)", " (C)"))
    pair = against_others(found[:1], [Asked(item, True, "A", True)])
    np.testing.assert_allclose(pair, [[found[0][1], np.logaddexp(found[0][0], found[0][2])]], rtol=1e-6)


class Watched(GPT2):
    """Remembers of how many places logits were taken at a time."""

    leading: ClassVar[list[tuple[int, ...]]] = []

    def logits(self, params, hidden):
        self.leading.append(hidden.shape[:-1])
        return super().logits(params, hidden)


def test_logits_are_of_one_place_of_a_batch_at_a_time(loaded, rows, together):
    found = answer_log_probs(Watched(loaded.model.config), loaded.params, rows[-3::-1], batch_size=4, progress=False)
    assert_alike(found[::-1], together[:-2])
    assert set(Watched.leading) == {(4,)}, "never [batch, time, vocab]"


def test_rows_that_do_not_fit_and_empty_batches(loaded, rows):
    for bad, comes_to in ((Choices([1] * 200, [[1], [2, 3]]), 201), (Choices([], [[1], [2]]), 0)):
        with pytest.raises(ValueError, match=rf"question 2 must have from 1 to 200 tokens .*, but has {comes_to}\."):
            answer_log_probs(loaded.model, loaded.params, [rows[0], bad])
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, but is 0"):
        answer_log_probs(loaded.model, loaded.params, rows, batch_size=0)
    assert len(answer_log_probs(loaded.model, loaded.params, [])) == 0


def word_level(vocabulary, *, space=False):
    """A tokenizer of whole words, whose unknown token is [UNK]; with `space`, they begin with ▁ as SentencePiece's."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(["[UNK]", *vocabulary])}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace() if space else tokenizers.pre_tokenizers.Whitespace()
    if space:
        made.decoder = tokenizers.decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def test_labels_are_found_without_and_with_a_space():
    plain = tokenizer()
    assert plain.convert_ids_to_tokens(list(label_tokens(plain, "AB").values())) == ["A", "B"]
    assert label_tokens(word_level(["(", "A", "B"]), "B") == {"B": 3}
    assert label_tokens(word_level(["▁(", "▁A", "▁B"], space=True), "A") == {"A": 2}


class Listed:
    """A tokenizer that splits texts as it is told to; token i of a letter is decoded as that letter."""

    unk_token_id = 0

    def __init__(self, **texts):
        self.texts = {" (": [1], **{text.replace("_", " "): tokens for text, tokens in texts.items()}}

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": self.texts.get(text.replace("(", "o"), self.texts.get(text, [0]))}

    def decode(self, tokens):
        return {10: "A", 11: " A", 20: "B", 21: " B"}.get(tokens[0], "")


def test_labels_have_one_form():
    mixed = {"_oA": [1, 10], "_oB": [9], "_o_A": [9], "_o_B": [1, 21]}  # behind " (", A without a space and B with one
    with pytest.raises(
        ValueError, match=r"the labels A, B must be one token each, all with or all without a space, but are "
    ):
        label_tokens(Listed(**mixed), "AB")
    assert label_tokens(Listed(**mixed), "A") == {"A": 10} and label_tokens(Listed(**mixed), "B") == {"B": 21}
    assert label_tokens(Listed(**mixed, _A=[11], _B=[21]), "AB") == {"A": 11, "B": 21}


def test_labels_that_are_not_a_token():
    lower = word_level(["(", "a", "b"])
    lower.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    for given, letters, found in (
        (word_level(["(", "B"]), "A", r"\['\[UNK\]'\]"),
        (tokenizer(), ["AZQ"], r"\['A', 'Z', 'Q'\]"),
        (lower, "AB", r"\['a'\], \['b'\]"),
    ):
        with pytest.raises(ValueError, match=rf"the labels .* must be one token each, .* but are {found}\.$"):
            label_tokens(given, letters)


def test_rows_are_what_a_reader_would_write():
    plain, chat = tokenizer(), tokenizer(template=TEMPLATE)
    assert plain.decode(encode(plain, "Which?", " (")) == "Which? ("
    assert chat.decode(encode(chat, "Which?", " (")) == "<Which?>! ("
    assert chat.decode(encode(chat, "Which?", " (", chat=False)) == "Which? ("
    row = answered_row(chat, "Which?", " I", [" agree", " disagree"])
    assert chat.decode(row.given) == "<Which?>! I"
    assert [chat.decode(answer) for answer in row.answers] == [" agree", " disagree"]
    doubted = conversations(facts("sums")[0])["after_right"]
    said = [message["content"] for message in doubted]
    assert chat.decode(encode(chat, doubted, "The")) == "".join(f"<{each}>" for each in said) + "!The"
    assert plain.decode(encode(plain, doubted, "The")) == (
        f"Question: {said[0]}\nAnswer: {said[1]}\nQuestion: {said[2]}\nAnswer: The"
    )


def test_an_eos_that_a_tokenizer_puts_after_every_text_is_removed():
    ending = tokenizer()
    doubted = conversations(facts("sums")[0])["after_right"]
    asked = [("Which?", " I", [" agree"]), (doubted, "The answer is", [" 21", " 32"])]
    expected = [answered_row(ending, *each) for each in asked]
    ending.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", ending.eos_token_id)]
    )
    assert ending("Which?")["input_ids"][-1] == ending.eos_token_id, "or this tests nothing"
    assert [answered_row(ending, *each) for each in asked] == expected


def test_a_token_over_the_seam_is_scored_as_a_whole():
    """If an answer merges with the token before it, all answers are scored from before that token."""
    merging = tokenizer(["xy xz"] * 5)
    assert len(merging("xy")["input_ids"]) == 1, "or this tests nothing"
    row = answered_row(merging, "", "x", ["y", "w"])
    assert row.given == []
    assert [merging.decode(answer) for answer in row.answers] == ["xy", "xw"]
    with pytest.raises(ValueError, match=r"an answer adds no token to the question: ''"):
        answered_row(merging, "Which?", " I", [" agree", ""])

"""Questions as tokens, and log-probabilities of their answers."""

import numpy as np
import pytest
import tokenizers
import transformers

from jaxrl_llm.analysis.sycophancy import ModelSource, facts
from jaxrl_llm.analysis.sycophancy.probes import conversations
from jaxrl_llm.analysis.sycophancy.scoring import against_others, encode, label_tokens
from jaxrl_llm.models import Loaded
from jaxrl_llm.scoring import Choices, answer_log_probs
from tests.analysis.sycophancy.conftest import CONTEXT, TEMPLATE, tokenizer


def test_a_question_that_is_too_long_has_no_numbers_and_the_other_answers_add_up(loaded):
    three, long = Choices([5, 6, 7], [[1], [2, 4], [3]]), Choices([1] * (CONTEXT + 1), [[1], [2], [3]])
    found, unread = ModelSource(loaded, progress=False).log_probs([three, long])
    (expected,) = answer_log_probs(loaded.model, loaded.params, [three], progress=False)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(unread) == 3 and np.isnan(unread).all(), "too long"
    pairs = against_others([found, unread])
    np.testing.assert_allclose(pairs, [[found[0], np.logaddexp(found[1], found[2])], [np.nan] * 2], rtol=1e-6)


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
        self.texts = {text.replace("_", " "): tokens for text, tokens in texts.items()}

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": self.texts.get(text, [0])}

    def decode(self, tokens):
        return {10: "A", 11: " A", 20: "B", 21: " B"}.get(tokens[0], "")


def test_labels_have_one_form():
    mixed = {"A": [10], "B": [9, 9], "_A": [9, 9], "_B": [21]}  # A without a space and B with one
    with pytest.raises(
        ValueError, match=r"the labels A, B must be one token each, all with or all without a space, but are "
    ):
        label_tokens(Listed(**mixed), "AB")
    assert label_tokens(Listed(**mixed), "A") == {"A": 10} and label_tokens(Listed(**mixed), "B") == {"B": 21}
    assert label_tokens(Listed(**mixed | {"_A": [11]}), "AB") == {"A": 11, "B": 21}


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


def row_of(tokenizer, *question):
    return ModelSource(Loaded(None, None, tokenizer, {})).row(*question)


def test_rows_are_what_a_reader_would_write():
    plain, chat = tokenizer(), tokenizer(template=TEMPLATE)
    assert plain.decode(encode(plain, "Which?", " (")) == "Which? ("
    assert chat.decode(encode(chat, "Which?", " (")) == "<Which?>! ("
    assert chat.decode(encode(chat, "Which?", " (", chat=False)) == "Which? ("
    row = row_of(chat, "Which?", " I", [" agree", " disagree"])
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
    expected = [row_of(ending, *each) for each in asked]
    ending.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", ending.eos_token_id)]
    )
    assert ending("Which?")["input_ids"][-1] == ending.eos_token_id, "or this tests nothing"
    assert [row_of(ending, *each) for each in asked] == expected


def test_a_token_over_the_seam_is_scored_as_a_whole():
    """If an answer merges with the token before it, all answers are scored from before that token."""
    merging = tokenizer(["xy xz"] * 5)
    assert len(merging("xy")["input_ids"]) == 1, "or this tests nothing"
    row = row_of(merging, "", "x", ["y", "w"])
    assert row.given == []
    assert [merging.decode(answer) for answer in row.answers] == ["xy", "xw"]
    with pytest.raises(ValueError, match=r"an answer adds no token to the question: ''"):
        row_of(merging, "Which?", " I", [" agree", ""])

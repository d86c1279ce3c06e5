"""Log-probabilities of several answers of a question, whose shared beginnings are read once."""

from typing import ClassVar

import numpy as np
import pytest

from jaxrl_llm.models.gpt2 import GPT2
from jaxrl_llm.scoring import PREFIX_BUCKET, Choices, Reading, answer_log_probs, groups_of
from tests.analysis.sycophancy.conftest import CONTEXT, logits_of, make_model
from tests.conftest import log_softmax


@pytest.fixture(scope="module")
def loaded():
    return make_model()


@pytest.fixture(scope="module")
def rows():
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
    """Compare with each answer read after its question, alone and without a cache."""
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
    three = rows[0]._replace(answers=[*rows[0].answers, *rows[3].answers[:1]])
    found = answer_log_probs(loaded.model, loaded.params, [three, rows[3]], progress=False)
    assert_alike([found[0][:2], found[1]], [together[0], together[3]])


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

"""Batches of records: what is in them, what they count, and what is refused. A token is a letter."""

import json

import numpy as np
import pytest

from jaxrl_llm.data import records
from jaxrl_llm.data.encoding import Encoder
from jaxrl_llm.data.jsonl import JsonLines
from jaxrl_llm.data.records import Demonstration, Judged, Preference, Prompt, Ranked
from jaxrl_llm.training.batches import COLLATE, Batches, encoder_of


class Letters:
    """A tokenizer whose tokens are the letters: a is 1, and 0 ends a text."""

    eos_token_id = bos_token_id = 0
    chat_template = None

    def __call__(self, string, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 96 for letter in string]}


def batches_of(kind, given, *, max_length=64, cut="right", multiple=8, batch_size=2, **knobs):
    encode = encoder_of(Encoder(Letters(), max_length=max_length, cut=cut))
    return Batches(given, encode, COLLATE[kind], batch_size=batch_size, seed=0, multiple=multiple, **knobs)


def letters(rng, most):
    return "".join(chr(97 + token) for token in rng.integers(0, 26, rng.integers(1, most)))


def ragged(kind, count=7):
    """Records of very different lengths, and rankings of 2 to 4 answers."""
    rng = np.random.default_rng(1)
    found = []
    for i in range(count):
        asked, answers = letters(rng, 20), tuple(letters(rng, 20) + "xyzw"[place] for place in range(2 + i % 3))
        found.append(
            {
                "prompts": Prompt(asked, {"solution": i}),
                "demonstrations": Demonstration(asked, answers[0]),
                "preferences": Preference(asked, *answers[:2]),
                "judged": Judged(asked, answers[0], i % 2 == 0),
                "ranked": Ranked(asked, answers, tuple(range(len(answers)))),
            }[kind]
        )
    return found


def counted(kind, batch):
    """Real tokens and places of a batch, from its arrays."""
    if kind == "ranked":
        return int((batch.answers.mask & batch.real[..., None]).sum()), batch.answers.mask.size
    sides = [batch[side] for side in {"preferences": (0, 1), "judged": (0, 2)}.get(kind, ())] or [batch]
    return sum(int(side.mask.sum()) for side in sides), sum(side.mask.size for side in sides)


@pytest.mark.parametrize("kind", COLLATE)
def test_tokens_and_waste_are_those_of_the_batches_in_every_epoch(kind):
    batches = batches_of(kind, ragged(kind))
    found = np.asarray([counted(kind, batches(step)) for step in range(9)])  # three epochs of three batches
    assert batches.order.left_over == 1
    assert len({int(epoch.sum()) for epoch in found[:, 0].reshape(3, 3)}) > 1, "chance leaves out others each time"
    assert [batches.tokens(steps) for steps in (9, 0, 4)] == [found[:steps, 0].sum() for steps in (9, 0, 4)]
    assert batches.pad_waste == pytest.approx(1 - found[:3, 0].sum() / found[:3, 1].sum())


def test_nothing_is_wasted_where_all_rows_are_alike():
    assert batches_of("preferences", [Preference("abc", "defg", "hijk")] * 4).pad_waste == 0
    # Three rows of the 8 places each, and the fourth repeats an answer.
    given = [Ranked("abc", ("defg", "hijk"), (0, 1)), Ranked("abc", ("defg",) * 2 + ("hijk",) * 2, (0, 0, 1, 1))]
    assert batches_of("ranked", given).pad_waste == 1 / 4


def rows_as_text(sequences):
    return ["".join(chr(96 + token) for token in row[real]) for row, real in zip(*sequences[:2], strict=True)]


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_kto_is_given_the_same_tokens_however_its_rows_are_padded(multiple):
    given = [Judged("a" * 10, "b", True), Judged("c", "d" * 12, False)]
    batch = batches_of("judged", given, multiple=multiple)(0)
    assert sorted(rows_as_text(batch.mismatched)) == ["a" * 10 + "d" * 12 + "`", "cb`"]
    assert batch.mismatched.mask.shape == batch.answers.mask.shape and batch.answers.mask.shape[1] % multiple == 0
    short = batches_of("judged", given, multiple=multiple, max_length=16)(0)  # where no row may be longer
    assert sorted(rows_as_text(short.mismatched)) == ["a" * 10 + "d" * 6, "cb`"]


@pytest.mark.parametrize("kind", ["preferences", "ranked"])
def test_answers_that_cutting_makes_equal_are_refused(kind):
    pair = Preference("abc", "ddddx", "ddddy")
    given = [pair if kind == "preferences" else Ranked("abc", ("z", "ddddx", "ddddy"), (0, 0, 1))] * 2
    first = 1 if kind == "preferences" else 2
    said = f"record 1: answers {first} and {first + 1} are the same in rows of 7 tokens or fewer"
    with pytest.raises(ValueError, match=said):
        batches_of(kind, given, max_length=7)
    batches_of(kind, given, max_length=8)
    batches_of("ranked", [Ranked("abc", ("ddddx", "ddddy", "z"), (1, 1, 0))] * 2, max_length=7)  # a tie may


def test_a_token_that_the_model_lacks_is_refused():
    given = [Demonstration("ba", "c"), Demonstration("a", "z")]
    batches_of("demonstrations", given, vocab_size=27)
    with pytest.raises(ValueError, match="record 2: the tokenizer writes token 26, but the model has 26"):
        batches_of("demonstrations", given, vocab_size=26)
    with pytest.raises(ValueError, match="record 1: the tokenizer writes token 3, but the model has 3"):
        batches_of("demonstrations", given, vocab_size=3)


def test_lines_are_named_as_the_file_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ["", "{", *(json.dumps({"prompt": asked}) for asked in ("ab", "cd")), "", json.dumps({"prompt": "e" * 30})]
    path.write_text("\n".join(lines))
    found = JsonLines(path, records.prompt, on_bad="skip")
    batches = batches_of("prompts", found, batch_size=3)
    assert batches.describe(0).startswith("records of lines ")
    assert sorted(batches.describe(0).split("lines ")[1].split(", ")) == ["3", "4", "6"]
    with pytest.raises(ValueError, match=r"record of line 6: a prompt of 30 tokens leaves no room"):
        batches_of("prompts", found, max_length=20)
    assert batches_of("prompts", found[:2]).describe(0) in ("records 1, 2", "records 2, 1")


def test_the_records_of_a_step_are_its_rows_with_what_else_stands_in_their_lines():
    given = ragged("prompts")
    batches = batches_of("prompts", given)
    for step in (0, 4):
        found = batches.records(step)
        assert rows_as_text(batches(step)) == [record.prompt for record in found]
        assert all(record == given[record.fields["solution"]] for record in found)

"""From text to tokens that fit, and from records to padded batches in an order that seed and step fix."""

import copy
import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from jaxrl_llm import models
from jaxrl_llm.data import records
from jaxrl_llm.data.records import JsonLines, Preference, Prompt, PromptCompletion, Ranked, UnpairedPreference
from jaxrl_llm.training.batches import KINDS, Batches, Encoder, EpochOrder

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
EOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    return models.load("tiny-gpt2").tokenizer


@pytest.fixture(scope="module")
def chat(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    return changed


def user(content):
    return {"role": "user", "content": content}


def test_a_conversation_that_the_template_refuses_is_a_bad_line(chat):
    refusing = copy.deepcopy(chat)
    refusing.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    lines = [{"messages": [{"role": "system", "content": "Be brief."}, *turns]}, {"messages": turns}]
    kind, encoder = KINDS["prompt-completion"], Encoder(refusing, max_length=64)
    found = records.read(lines, kind.parse, on_bad="skip", check=False)
    assert len(Batches(found, kind, encoder, batch_size=1, seed=0)) == 1
    assert len(found) == 1 and [bad.reason for bad in found.bad_lines] == ["the chat template: no system"]
    with pytest.raises(ValueError, match="data has 1 bad row: row 0: the chat template: no system"):
        Batches(records.read(lines, kind.parse), kind, encoder, batch_size=1, seed=0)


def test_the_completion_follows_the_prompt_and_ends_once(tokenizer):
    encode = Encoder(tokenizer, max_length=64)
    prompt, (completion, other), _ = encode("The sea", [" is wide.", " is deep.<|endoftext|>"])
    assert tokenizer.decode(prompt) == "The sea"
    assert tokenizer.decode(completion) == " is wide.<|endoftext|>" and completion.count(EOS) == 1
    assert other.count(EOS) == 1 and other[-1] == EOS


def test_an_empty_prompt_is_the_beginning_of_a_text(tokenizer):
    assert Encoder(tokenizer, max_length=64)("", ["Once"]).prompt == [tokenizer.bos_token_id]


def test_conversations_go_through_the_template_and_completions_are_what_they_add(chat):
    encode = Encoder(chat, max_length=64)
    prompt, completions, _ = encode((user("Hi"),), [({"role": "assistant", "content": "Hello"},), "Hello"])
    assert chat.decode(prompt) == "<user> Hi<|endoftext|>\n<assistant> "
    assert [chat.decode(each) for each in completions] == ["Hello<|endoftext|>"] * 2
    assert all(each.count(EOS) == 1 for each in completions)


def test_a_reward_model_reads_each_ranked_text_as_one_to_the_end_of_the_template(chat):
    """Tokens may span the boundary to the prompt; after the end of turn comes the template's newline."""
    encode = Encoder(chat, max_length=64)
    said = [({"role": "assistant", "content": each},) for each in ("Hello", "\n\nHe")]
    prompt, completions, _ = encode((user("Hi"),), said, whole=True)
    assert [chat.decode(each) for each in completions] == [" Hello<|endoftext|>\n", " \n\nHe<|endoftext|>\n"]
    for each, turn in zip(completions, said, strict=True):
        assert prompt + each == chat.apply_chat_template([user("Hi"), *turn])["input_ids"]
    prompt, completions, _ = encode("The se", ["a", " is"], whole=True)
    assert chat("The sea")["input_ids"] + [EOS] == prompt + completions[0]
    assert chat("The se is")["input_ids"] + [EOS] == prompt + completions[1]
    assert encode("", ["Once"], whole=True)[:2] == ([], [[*chat("Once")["input_ids"], EOS]])
    cut, (yes, no), _ = Encoder(chat, max_length=16)("word " * 30, ["yes", "no, by no means"], whole=True)
    assert chat.decode(cut + yes).endswith("word yes<|endoftext|>") and len(cut + no) == 16


def test_a_string_among_conversations_is_encoded_as_one_of_them(chat):
    encode = Encoder(chat, max_length=64)
    said = {"role": "assistant", "content": "Hello"}
    expected = encode((user("Hi"),), [(said,)])
    for asked, answer in [("Hi", (said,)), ("Hi", (user("Hi"), said)), ((user("Hi"),), (user("Hi"), said))]:
        assert encode(asked, [answer]) == expected


def test_left_cuts_the_prompt_and_both_completions_follow_the_same_one(tokenizer):
    encode = Encoder(tokenizer, max_length=16, cut="left")
    whole = Encoder(tokenizer, max_length=200)("word " * 30, [" yes", " no, by no means at all"])
    prompt, completions, _ = encode("word " * 30, [" yes", " no, by no means at all"])
    assert completions == whole.completions and prompt == whole.prompt[-len(prompt) :]
    assert len(prompt) + max(map(len, completions)) == 16
    assert (encode.cut_prompts, encode.cut_completions) == (1, 0)


def test_a_prompt_that_is_cut_keeps_the_token_it_began_with(tokenizer):
    asked = tokenizer.bos_token + "word " * 30
    encode = Encoder(tokenizer, max_length=16)
    whole = Encoder(tokenizer, max_length=200)(asked, [" yes"])
    prompt, completions, _ = encode(asked, [" yes"])
    assert completions == whole.completions and len(prompt) + len(completions[0]) == 16
    assert prompt == [tokenizer.bos_token_id, *whole.prompt[-len(prompt) + 1 :]]
    assert encode.prompt(asked, room=10) == [tokenizer.bos_token_id, *whole.prompt[-5:]]
    assert encode.cut_prompts == 2
    with pytest.raises(ValueError, match="leaves no room for 15 more"):
        encode.prompt(asked, room=15)


def test_right_cuts_the_completions_that_are_too_long(tokenizer):
    encode = Encoder(tokenizer, max_length=12, cut="right")
    whole = Encoder(tokenizer, max_length=200)("The sea", [" word" * 30, " a"])
    prompt, completions, _ = encode("The sea", [" word" * 30, " a"])
    assert prompt == whole.prompt and completions == [whole.completions[0][: 12 - len(prompt)], whole.completions[1]]
    assert completions[0][-1] != EOS
    assert (encode.cut_prompts, encode.cut_completions) == (0, 1)


def test_a_prompt_leaves_the_room_that_is_asked_for(tokenizer):
    encode = Encoder(tokenizer, max_length=20, cut="left")
    assert len(encode.prompt("word " * 30, room=8)) == 12 and encode.cut_prompts == 1
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens leaves no room for 20 more in 20"):
        encode.prompt("word", room=20)
    with pytest.raises(ValueError, match="leaves no room for 8 more"):
        Encoder(tokenizer, max_length=20, cut="raise").prompt("word " * 30, room=8)


@pytest.mark.parametrize(
    ("cut", "prompt", "answer", "said"),
    [
        ("raise", "word " * 30, " a", "are longer than 12"),
        ("left", "The sea", " word" * 30, "leaves no token for its prompt in 12"),
        ("right", "word " * 30, " a", "leaves no room for a completion in 12"),
    ],
)
def test_what_cannot_be_cut_is_refused(tokenizer, cut, prompt, answer, said):
    with pytest.raises(ValueError, match=said):
        Encoder(tokenizer, max_length=12, cut=cut)(prompt, [answer])


def test_wrong_arguments_are_named(tokenizer, chat):
    with pytest.raises(ValueError, match="cut must be one of left, right, raise, skip, but is 'middle'"):
        Encoder(tokenizer, max_length=12, cut="middle")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Encoder(tokenizer, max_length=12)((user("Hi"),), ["Hello"])
    fickle = copy.deepcopy(chat)
    fickle.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="changes the prompt when a completion follows"):
        Encoder(fickle, max_length=64)((user("Hi"),), ["Hello"])


# Order ----------------------------------------------------------------------------------------------------------------


@hypothesis.given(
    lengths=strategies.lists(strategies.integers(1, 50), min_size=1, max_size=60),
    batch_size=strategies.integers(1, 9),
    seed=strategies.integers(0, 5),
)
def test_every_row_comes_at_most_once_an_epoch_and_epochs_differ_only_in_order(lengths, batch_size, seed):
    batch_size = min(batch_size, len(lengths))
    order = EpochOrder(lengths, batch_size=batch_size, seed=seed)
    for epoch in range(2):
        rows = np.concatenate([order(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)])
        assert len(set(rows)) == len(rows) == len(lengths) // batch_size * batch_size
        assert set(rows) <= set(range(len(lengths)))


def test_a_batch_depends_on_seed_and_step_alone():
    lengths = np.random.default_rng(0).integers(1, 90, 64)
    whole = EpochOrder(lengths, batch_size=4, seed=3)
    batches = [whole(step) for step in range(40)]
    for step in (39, 0, 17, 16, 15):
        np.testing.assert_array_equal(EpochOrder(lengths, batch_size=4, seed=3)(step), batches[step])
        np.testing.assert_array_equal(whole(step), batches[step])
    assert any((EpochOrder(lengths, batch_size=4, seed=4)(step) != batches[step]).any() for step in range(8))


def test_an_epoch_is_the_batches_of_its_steps_and_says_how_many_rows_it_leaves_out():
    order = EpochOrder(np.random.default_rng(0).integers(1, 90, 30), batch_size=4, seed=3)
    assert (order.steps_per_epoch, order.left_over) == (7, 2)
    for number in (1, 0):
        np.testing.assert_array_equal(order.epoch(number), [order(7 * number + step) for step in range(7)])


def test_rows_of_like_length_stand_together():
    lengths = np.random.default_rng(0).integers(1, 90, 640)

    def waste(pool):
        rows = lengths[EpochOrder(lengths, batch_size=8, seed=0, pool=pool).epoch(0)]
        return 1 - rows.sum() / (8 * rows.max(axis=1)).sum()

    assert waste(16) < 0.1 < 0.3 < waste(1)


def test_a_batch_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch_size must be from 1 to the 3 rows, but is 4"):
        EpochOrder([1, 2, 3], batch_size=4, seed=0)


# Batches; here a token is a letter ------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are the letters: a is 1, and 0 ends a text."""

    eos_token_id = bos_token_id = 0
    chat_template = None

    def __call__(self, string, add_special_tokens=True):
        return {"input_ids": [ord(letter) - 96 for letter in string]}


def batches_of(kind, given, *, max_length=64, cut="right", multiple=8, batch_size=2, **options):
    encoder = Encoder(Letters(), max_length=max_length, cut=cut)
    return Batches(given, KINDS[kind], encoder, batch_size=batch_size, seed=0, multiple=multiple, **options)


def letters(rng, most):
    return "".join(chr(97 + token) for token in rng.integers(0, 26, rng.integers(1, most)))


def ragged(kind, count=7):
    """Records of very different lengths, and rankings of 2 to 4 completions."""
    rng = np.random.default_rng(1)
    found = []
    for i in range(count):
        asked, answers = letters(rng, 20), tuple(letters(rng, 20) + "xyzw"[place] for place in range(2 + i % 3))
        found.append(
            {
                "prompt-only": Prompt(asked, {"solution": i}),
                "prompt-completion": PromptCompletion(asked, answers[0]),
                "prompt-of-completion": Prompt(asked),
                "preference": Preference(asked, *answers[:2]),
                "unpaired-preference": UnpairedPreference(asked, answers[0], i % 2 == 0),
                "ranked": Ranked(asked, answers, tuple(range(len(answers)))),
                "rated": Ranked(asked, answers, tuple(range(len(answers))), tuple(map(float, range(len(answers))))),
            }[kind]
        )
    return found


def counted(kind, batch):
    """Real tokens and places of a batch, from its arrays."""
    if kind in ("ranked", "rated"):
        return int((batch.completions.mask & batch.real[..., None]).sum()), batch.completions.mask.size
    sides = [batch[side] for side in {"preference": (0, 1), "unpaired-preference": (0, 2)}.get(kind, ())] or [batch]
    return sum(int(side.mask.sum()) for side in sides), sum(side.mask.size for side in sides)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_waste_are_those_of_the_batches_in_every_epoch(kind):
    batches = batches_of(kind, ragged(kind))
    found = np.asarray([counted(kind, batches(step)) for step in range(9)])  # three epochs of three batches
    assert batches.order.left_over == 1
    assert len({int(epoch.sum()) for epoch in found[:, 0].reshape(3, 3)}) > 1, "chance leaves out others each time"
    assert [batches.tokens(steps) for steps in (9, 0, 4)] == [found[:steps, 0].sum() for steps in (9, 0, 4)]
    assert batches.pad_waste == pytest.approx(1 - found[:3, 0].sum() / found[:3, 1].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_texts_of_their_records(kind):
    batches = batches_of(kind, ragged(kind), batch_size=3)
    batch, found = batches(1), batches.records(1)
    prompts = [record.prompt for record in found]
    match kind:
        case "prompt-only" | "prompt-of-completion":
            assert rows_as_text(batch) == prompts
        case "prompt-completion":
            assert rows_as_text(batch) == [f"{record.prompt}{record.completion}`" for record in found]
            scored = batch._replace(mask=batch.completion_mask)
            assert rows_as_text(scored) == [f"{record.completion}`" for record in found]
        case "preference":
            assert rows_as_text(batch.chosen) == [f"{record.prompt}{record.chosen}`" for record in found]
            assert rows_as_text(batch.rejected) == [f"{record.prompt}{record.rejected}`" for record in found]
        case "unpaired-preference":
            assert rows_as_text(batch.completions) == [f"{record.prompt}{record.completion}`" for record in found]
            np.testing.assert_array_equal(batch.desirable, [record.label for record in found])
            others = [found[place - 1].completion for place in range(3)]
            assert rows_as_text(batch.mismatched) == [f"{a}{b}`" for a, b in zip(prompts, others, strict=True)]
        case "ranked" | "rated":
            for row, record in enumerate(found):
                there = rows_as_text([leaf[row][batch.real[row]] for leaf in batch.completions])
                assert there == [f"{record.prompt}{each}`" for each in record.completions]
                np.testing.assert_array_equal(batch.ranks[row][batch.real[row]], record.ranks)
                np.testing.assert_array_equal(batch.margins[row].sum(), sum(record.margins))
    assert batches.describe(1).startswith("rows ")


def test_nothing_is_wasted_where_all_rows_are_alike():
    assert batches_of("preference", [Preference("abc", "defg", "hijk")] * 4).pad_waste == 0
    # Three rows of the 8 places each, and the fourth repeats an answer.
    given = [Ranked("abc", ("defg", "hijk"), (0, 1)), Ranked("abc", ("defg",) * 2 + ("hijk",) * 2, (0, 0, 1, 1))]
    assert batches_of("ranked", given).pad_waste == 1 / 4


def rows_as_text(sequences):
    return ["".join(chr(96 + token) for token in row[real]) for row, real in zip(*sequences[:2], strict=True)]


@pytest.mark.parametrize("multiple", [1, 8, 32])
def test_kto_is_given_the_same_tokens_however_its_rows_are_padded(multiple):
    given = [UnpairedPreference("a" * 10, "b", True), UnpairedPreference("c", "d" * 12, False)]
    batch = batches_of("unpaired-preference", given, multiple=multiple)(0)
    assert sorted(rows_as_text(batch.mismatched)) == ["a" * 10 + "d" * 12 + "`", "cb`"]
    assert (
        batch.mismatched.mask.shape == batch.completions.mask.shape and batch.completions.mask.shape[1] % multiple == 0
    )
    short = batches_of("unpaired-preference", given, multiple=multiple, max_length=16)(0)  # where no row may be longer
    assert sorted(rows_as_text(short.mismatched)) == ["a" * 10 + "d" * 6, "cb`"]


@pytest.mark.parametrize("kind", ["preference", "ranked"])
def test_completions_that_cutting_makes_equal_are_refused(kind):
    pair = Preference("abc", "ddddx", "ddddy")
    given = [pair if kind == "preference" else Ranked("abc", ("z", "ddddx", "ddddy"), (0, 0, 1))] * 2
    first = 1 if kind == "preference" else 2
    said = rf"rows? 0: completions {first} and {first + 1} must differ, but are equal in 7 tokens"
    with pytest.raises(ValueError, match=said):
        batches_of(kind, given, max_length=7)
    batches_of(kind, given, max_length=8)
    batches_of("ranked", [Ranked("abc", ("ddddx", "ddddy", "z"), (1, 1, 0))] * 2, max_length=7)  # a tie may


def test_a_token_that_the_model_lacks_is_refused():
    given = [PromptCompletion("ba", "c"), PromptCompletion("a", "z")]
    batches_of("prompt-completion", given, vocab_size=27)
    with pytest.raises(
        ValueError, match="row 1: tokens must be below 26, the model's vocabulary, but the tokenizer gives 26"
    ):
        batches_of("prompt-completion", given, vocab_size=26)
    with pytest.raises(ValueError, match=r"row 0: tokens must be below 3, .*, but the tokenizer gives 3"):
        batches_of("prompt-completion", given, vocab_size=3)


def test_lines_are_named_as_the_file_counts_them(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = ["", "{", *(json.dumps({"prompt": asked}) for asked in ("ab", "cd")), "", json.dumps({"prompt": "e" * 30})]
    path.write_text("\n".join(lines))
    found = JsonLines(path, records.prompt, on_bad="skip")
    batches = batches_of("prompt-only", found, batch_size=3)
    assert batches.describe(0).startswith("lines ")
    assert sorted(batches.describe(0).split("lines ")[1].split(", ")) == ["3", "4", "6"]
    assert [bad.number for bad in batches_of("prompt-only", found, max_length=20).bad] == [2, 6]
    whole = JsonLines(path, records.prompt)
    with pytest.raises(ValueError, match=r"has 2 bad lines: line 2: .*line 6: a prompt of 30 tokens leaves no room"):
        batches_of("prompt-only", whole, max_length=20)
    assert batches_of("prompt-only", found[:2]).describe(0) in ("rows 0, 1", "rows 1, 0")


def test_the_records_of_a_step_are_its_rows_with_what_else_stands_in_their_lines():
    given = ragged("prompt-only")
    batches = batches_of("prompt-only", given)
    for step in (0, 4):
        found = batches.records(step)
        assert rows_as_text(batches(step)) == [record.prompt for record in found]
        assert all(record == given[record.fields["solution"]] for record in found)

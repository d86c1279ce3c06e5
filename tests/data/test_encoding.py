"""Prompts and answers as tokens that fit, and an account of what was cut."""

import copy

import pytest

from jaxrl_llm import models
from jaxrl_llm.data.encoding import Encoder

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


def test_the_answer_follows_the_prompt_and_ends_once(tokenizer):
    prompt, (answer, other) = Encoder(tokenizer, max_length=64)("The sea", [" is wide.", " is deep.<|endoftext|>"])
    assert tokenizer.decode(prompt) == "The sea"
    assert tokenizer.decode(answer) == " is wide.<|endoftext|>" and answer.count(EOS) == 1
    assert other.count(EOS) == 1 and other[-1] == EOS


def test_an_empty_prompt_is_the_beginning_of_a_text(tokenizer):
    assert Encoder(tokenizer, max_length=64)("", ["Once"]).prompt == [tokenizer.bos_token_id]


def test_conversations_go_through_the_template_and_answers_are_what_they_add(chat):
    encode = Encoder(chat, max_length=64)
    prompt, answers = encode((user("Hi"),), [({"role": "assistant", "content": "Hello"},), "Hello"])
    assert chat.decode(prompt) == "<user> Hi<|endoftext|>\n<assistant> "
    assert [chat.decode(each) for each in answers] == ["Hello<|endoftext|>"] * 2
    assert all(each.count(EOS) == 1 for each in answers)


def test_a_string_among_conversations_is_encoded_as_one_of_them(chat):
    encode = Encoder(chat, max_length=64)
    said = {"role": "assistant", "content": "Hello"}
    expected = encode((user("Hi"),), [(said,)])
    for asked, answer in [("Hi", (said,)), ("Hi", (user("Hi"), said)), ((user("Hi"),), (user("Hi"), said))]:
        assert encode(asked, [answer]) == expected


def test_left_cuts_the_prompt_and_both_answers_follow_the_same_one(tokenizer):
    encode = Encoder(tokenizer, max_length=16, cut="left")
    whole = Encoder(tokenizer, max_length=200)("word " * 30, [" yes", " no, by no means at all"])
    prompt, answers = encode("word " * 30, [" yes", " no, by no means at all"])
    assert answers == whole.answers and prompt == whole.prompt[-len(prompt) :]
    assert len(prompt) + max(map(len, answers)) == 16
    assert (encode.cut_prompts, encode.cut_answers) == (1, 0)


def test_a_prompt_that_is_cut_keeps_the_token_it_began_with(tokenizer):
    asked = tokenizer.bos_token + "word " * 30
    encode = Encoder(tokenizer, max_length=16)
    whole = Encoder(tokenizer, max_length=200)(asked, [" yes"])
    prompt, answers = encode(asked, [" yes"])
    assert answers == whole.answers and len(prompt) + len(answers[0]) == 16
    assert prompt == [tokenizer.bos_token_id, *whole.prompt[-len(prompt) + 1 :]]
    assert encode.prompt(asked, room=10) == [tokenizer.bos_token_id, *whole.prompt[-5:]]
    assert encode.cut_prompts == 2
    with pytest.raises(ValueError, match="leaves no room for 15 more"):
        encode.prompt(asked, room=15)


def test_right_cuts_the_answers_that_are_too_long(tokenizer):
    encode = Encoder(tokenizer, max_length=12, cut="right")
    whole = Encoder(tokenizer, max_length=200)("The sea", [" word" * 30, " a"])
    prompt, answers = encode("The sea", [" word" * 30, " a"])
    assert prompt == whole.prompt and answers == [whole.answers[0][: 12 - len(prompt)], whole.answers[1]]
    assert answers[0][-1] != EOS
    assert (encode.cut_prompts, encode.cut_answers) == (0, 1)


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
        ("right", "word " * 30, " a", "leaves no room for an answer in 12"),
    ],
)
def test_what_cannot_be_cut_is_refused(tokenizer, cut, prompt, answer, said):
    with pytest.raises(ValueError, match=said):
        Encoder(tokenizer, max_length=12, cut=cut)(prompt, [answer])


def test_wrong_arguments_are_named(tokenizer, chat):
    with pytest.raises(ValueError, match="cut must be one of left, right, raise, but is 'middle'"):
        Encoder(tokenizer, max_length=12, cut="middle")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Encoder(tokenizer, max_length=12)((user("Hi"),), ["Hello"])
    fickle = copy.deepcopy(chat)
    fickle.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="writes the prompt otherwise when an answer follows"):
        Encoder(fickle, max_length=64)((user("Hi"),), ["Hello"])

"""Conversations: in Python, and in a terminal."""

import re

import pytest

import jaxrl_llm as jl
from tests.test_cli import CONTEXT, write_model

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture(scope="module")
def lm(folder):
    return jl.load(folder)


def test_every_turn_is_the_reply_to_the_whole_conversation(lm):
    options = {"max_new_tokens": 3, "temperature": 0.7, "seed": 4}
    chat = jl.Chat(lm, system="be", **options)
    for number, message in enumerate(["cat", "mat"], 1):
        pieces = list(chat.stream(message))
        expected = lm.chat(chat.messages[:-1], **options)
        assert "".join(pieces) == chat.completion.text == expected.text == chat.messages[-1]["content"]
        assert chat.completion.tokens == expected.tokens and chat.completion.finish_reason == expected.finish_reason
        assert [each["role"] for each in chat.messages] == ["system"] + number * ["user", "assistant"]
    assert repr(chat) == f"Chat({lm.name}: 2 turns)"
    chat.undo()
    assert len(chat.messages) == 3
    assert chat.send("mat") == expected.text
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "be"}]
    with pytest.raises(ValueError, match="undo needs a message and its reply, but"):
        chat.undo()


def test_an_abandoned_reply_does_not_count(lm):
    chat = jl.Chat(lm, max_new_tokens=9, seed=1)
    reply = chat.stream("cat")
    next(reply)
    reply.close()
    assert chat.messages == [] and chat.completion is None
    assert chat.send("cat") == lm.chat("cat", max_new_tokens=9, seed=1).text


def test_a_full_context_says_so(lm):
    chat = jl.Chat(lm, max_new_tokens=CONTEXT, greedy=True)
    with pytest.warns(UserWarning, match=rf"the reply was cut after 3 tokens, .* context of {CONTEXT} is full: undo"):
        chat.send("a" * (CONTEXT - 5))
    assert len(chat.completion.tokens) == 3
    with pytest.raises(
        ValueError, match=f"room for a reply in the context of {CONTEXT} tokens, but has .*: undo turns"
    ):
        chat.send("cat")


@pytest.mark.slow
def test_a_context_that_slides_is_never_full(lm):
    """The window: the last half of the conversation, then half of that and what is new."""
    chat = jl.Chat(lm, max_new_tokens=CONTEXT, greedy=True, context="slide")
    for message in ("a" * (CONTEXT + 2), "cat"):
        reply = chat.send(message)
        expected = lm.chat(chat.messages[:-1], max_new_tokens=CONTEXT, greedy=True, context="slide")
        assert reply == expected.text and chat.completion.tokens == expected.tokens
    half = lm.tokenizer("".join(f"<{each['content']}>" for each in chat.messages[:-1]))["input_ids"][-(CONTEXT // 2) :]
    read_anew = lm.generate([half], greedy=True, max_new_tokens=CONTEXT - CONTEXT // 2)[0]
    assert expected.tokens[: len(read_anew.tokens)] == read_anew.tokens


def test_what_cannot_chat_is_refused(folder):
    with pytest.raises(TypeError, match="lm must be a model, its name or its path, but is a int"):
        jl.Chat(3)
    with pytest.raises(TypeError, match="did you mean"):
        jl.Chat(folder, max_tokens=3)
    with pytest.raises(ValueError, match="no chat template"):
        jl.Chat("tiny-gpt2")
    for option in ({"cut": "left"}, {"guidance_prompt": "x"}):
        with pytest.raises(ValueError, match="a chat does not use cut and guidance_prompt"):
            jl.Chat(folder, **option)
    with pytest.raises(ValueError, match="the strategy greedy does not use temperature"):
        jl.Chat(folder, greedy=True, temperature=0.5)
    with pytest.raises(TypeError, match=r"Chat\(\) got an unexpected keyword argument 'temprature': did you mean"):
        jl.Chat(folder, temprature=0.5)
    chat = jl.Chat(folder)
    for wrong, error in ((None, TypeError), (["x"], TypeError), ("\udcff", ValueError)):
        with pytest.raises(error, match="message must be"):
            chat.send(wrong)


def test_a_terminal_converses(run, folder, lm):
    options = ("--model", folder, "--max-new-tokens", 3, "--greedy", "--system", "be")
    lines = [
        "cat",
        "\udcff",
        "",
        "/undo",
        "/undo",
        "/clear",
        "/foo",
        "/undo 2",
        "/system",
        "the",
        "/help",
        "/quit",
        "mat",
    ]
    status, out, err = run("chat", *options, stdin="\r\n".join(lines))
    first = lm.chat(
        [{"role": "system", "content": "be"}, {"role": "user", "content": "cat"}], max_new_tokens=3, greedy=True
    )
    second = lm.chat("the", max_new_tokens=3, greedy=True)
    assert (status, out.splitlines()[:2]) == (0, [first.text, second.text])
    assert out.splitlines()[2].startswith("/undo ") and "mat" not in out
    told = [line for line in err.splitlines() if line.startswith("jaxrl-llm:")]
    assert told == [
        "jaxrl-llm: the message must be text in UTF-8, but holds the byte 0xff at character 1.",
        "jaxrl-llm: undo needs a message and its reply, but the conversation has none.",
        "jaxrl-llm: a command must be one of /clear, /help, /quit, /system, /undo, but is /foo.",
        "jaxrl-llm: /undo takes no text, but is given '2'.",
    ]
    assert err.count("[cut after 3 tokens]") == sum(each.finish_reason == "length" for each in (first, second))


def test_a_terminal_is_told_once_that_the_context_is_full(run, folder):
    status, _, err = run("chat", "--model", folder, "--greedy", stdin="a" * (CONTEXT - 5))
    assert status == 0 and re.fullmatch(r"\[the reply was cut after 3 tokens, .* is full: undo turns, .*\]\n", err)

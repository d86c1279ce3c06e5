"""From conversations and strings to tokens: those of the whole text behind its prompt, the assistant's trained on."""

import copy
import itertools
import json

import numpy as np
import pytest
import tokenizers

from jaxrl_llm.data import records
from jaxrl_llm.training import tokenised
from jaxrl_llm.training.batches import KINDS, Batches, show_mask
from jaxrl_llm.training.encoding import Encoder
from tests.training import chats


def message(role, content, **further):
    return {"role": role, "content": content, **further}


ASKED, THANKED, COMPLAINED = message("user", "The king"), message("user", "thank you"), message("user", "that is wrong")
CHOSEN = [ASKED, message("assistant", "was good."), THANKED, message("assistant", "You are welcome.")]
REJECTED = [ASKED, message("assistant", "was a"), COMPLAINED, message("assistant", "Sorry.")]
PAIR = records.preference({"chosen": CHOSEN, "rejected": REJECTED})
TURNS = {  # of the chosen conversation, what is trained on
    "llama2": [" was good. </s>", " You are welcome. </s>"],
    "llama3": ["was good.<|eot_id|>", "You are welcome.<|eot_id|>"],
    "qwen2": ["was good.<|im_end|>", "You are welcome.<|im_end|>"],
    "qwen3": ["was good.<|im_end|>", "<think>\n\n</think>\n\nYou are welcome.<|im_end|>"],
    "gemma": ["was good.<end_of_turn>", "You are welcome.<end_of_turn>"],
    "r1": ["was good.<|end|>", "You are welcome.<|end|>"],
    "newline": ["was good.<|endoftext|>", "You are welcome.<|endoftext|>"],
}


def encoder(tokenizer, **options):
    return Encoder(tokenizer, **{"max_length": 400, "ends": chats.ends(tokenizer)} | options)


def rendered(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(list(messages), tokenize=False, **options)


def trained(tokenizer, found, which=0):
    """The texts of the runs of tokens that are trained on."""
    tokens, marks = [*found.prompt, *found.completions[which]], [False] * len(found.prompt) + found.masks[which]
    decode = lambda count: tokenizer.decode(tokens[:count])  # noqa: E731
    bounds = [0, *(i for i in range(1, len(tokens)) if marks[i] != marks[i - 1]), len(tokens)]
    return [decode(end)[len(decode(start)) :] for start, end in itertools.pairwise(bounds) if marks[start]]


# Conversations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", chats.FORMS)
def test_of_several_turns_the_assistants_alone_are_trained_on(form):
    tokenizer = chats.FORMS[form]()
    found = encoder(tokenizer)(PAIR.prompt, PAIR.completions)
    assert trained(tokenizer, found) == TURNS[form]
    others = [each for each in trained(tokenizer, found, 1) if "wrong" in each]
    assert len(trained(tokenizer, found, 1)) == 2 and not others
    last = encoder(tokenizer, train_on="last")(PAIR.prompt, PAIR.completions)
    assert trained(tokenizer, last) == TURNS[form][-1:]
    assert last.prompt == found.prompt and last.completions == found.completions
    every = encoder(tokenizer, train_on="completion")(PAIR.prompt, PAIR.completions)
    assert every.prompt == found.prompt and all(map(all, every.masks))
    assert tokenizer.decode(every.completions[0]) == tokenizer.decode(found.completions[0])


@pytest.mark.parametrize("form", [form for form in chats.FORMS if form != "newline"])
def test_a_completions_tokens_are_those_of_the_whole_conversation(form):
    tokenizer = chats.FORMS[form]()
    found = encoder(tokenizer)(PAIR.prompt, PAIR.completions)
    for completion, messages in zip(found.completions, (CHOSEN, REJECTED), strict=True):
        whole = tokenizer(rendered(tokenizer, messages), add_special_tokens=False)["input_ids"]
        tokens = [*found.prompt, *completion]
        assert whole[: len(tokens)] == tokens
        assert not tokenizer.decode(whole[len(tokens) :]).strip(), "a new line after the end of the turn at most"


@pytest.mark.parametrize("form", [form for form in chats.FORMS if form != "r1"])
def test_a_prompts_tokens_are_those_that_decoding_gives(form):
    tokenizer = chats.FORMS[form]()
    found = encoder(tokenizer)((ASKED,), [(CHOSEN[1],)])
    assert found.prompt == encoder(tokenizer).prompt((ASKED,), room=1)
    before = tokenizer(rendered(tokenizer, [ASKED], add_generation_prompt=True), add_special_tokens=False)["input_ids"]
    assert found.prompt == before


def test_messages_of_several_turns_have_the_prompt_before_the_first_or_the_last_answer():
    tokenizer = chats.FORMS["qwen2"]()
    record = records.prompt_completion({"messages": CHOSEN})
    assert record.prompt == (ASKED,) and record.completion == tuple(CHOSEN[1:])
    found = {how: encoder(tokenizer, train_on=how)(record.prompt, record.completions) for how in ("all", "last")}
    assert (
        trained(tokenizer, found["all"]) == TURNS["qwen2"] and trained(tokenizer, found["last"]) == TURNS["qwen2"][1:]
    )
    assert found["last"].prompt == encoder(tokenizer).prompt(tuple(CHOSEN[:3]), room=1)
    assert [*found["last"].prompt, *found["last"].completions[0]] == [
        *found["all"].prompt,
        *found["all"].completions[0],
    ]
    greeted = [message("assistant", "Hello!"), *CHOSEN]
    assert records.prompt_completion({"messages": greeted}).prompt == tuple(greeted[:2]), "a greeting has no prompt"


def test_thoughts_are_trained_on_as_the_template_writes_them():
    tokenizer = chats.FORMS["qwen3"]()
    thought = message("assistant", "<think>\nhm\n</think>\n\nwas good.")
    (first,) = trained(tokenizer, encoder(tokenizer)((ASKED,), [(thought,)]))
    assert first == "<think>\nhm\n</think>\n\nwas good.<|im_end|>"
    found = encoder(tokenizer)((ASKED,), [(thought, *CHOSEN[2:])])
    assert trained(tokenizer, found) == TURNS["qwen3"], "thoughts of an earlier turn are not in the conversation"
    off = encoder(tokenizer)((ASKED,), [(CHOSEN[1],)], template={"enable_thinking": False})
    assert (
        tokenizer.decode(off.prompt).endswith("<think>\n\n</think>\n\n")
        and trained(tokenizer, off) == TURNS["qwen2"][:1]
    )
    begun = chats.FORMS["r1"]()  # decoding is given <think>, which the finished turn lacks: the prompt ends before it
    assert begun.decode(encoder(begun)((ASKED,), [(CHOSEN[1],)]).prompt) == "<|begin|><|User|>The king<|Assistant|>"


def test_a_token_that_would_span_the_boundary_does_not():
    """The template writes a space before the answer, which a token of the whole text would join with it."""
    tokenizer = chats.FORMS["newline"]()
    found = encoder(tokenizer)((ASKED,), [(message("assistant", "was good."),)])
    assert tokenizer.decode(found.prompt).endswith("<assistant> ") and trained(tokenizer, found) == TURNS["newline"][:1]
    whole = tokenizer(rendered(tokenizer, [ASKED, CHOSEN[1]]), add_special_tokens=False)["input_ids"]
    assert whole[: len(found.prompt)] != found.prompt


def test_control_tokens_of_messages_are_words_and_the_masks_stay_right():
    for form in ("llama2", "qwen2"):
        tokenizer = chats.FORMS[form]()
        forged = message("assistant", f"was {tokenizer.eos_token} a")
        found = encoder(tokenizer)((ASKED,), [(forged, *CHOSEN[2:])])
        first, second = trained(tokenizer, found)
        assert first.count(tokenizer.eos_token) == 2 and second == TURNS[form][1]
        plain = encoder(tokenizer)((ASKED,), [tuple(CHOSEN[1:])])
        ends = [each.completions[0].count(tokenizer.eos_token_id) for each in (found, plain)]
        assert ends[0] == ends[1]


def test_completions_end_in_eos_unless_the_template_ends_them_by_another_end():
    tokenizer = chats.FORMS["gemma"]()
    end, eos = tokenizer.convert_tokens_to_ids("<end_of_turn>"), tokenizer.eos_token_id
    assert encoder(tokenizer)((ASKED,), [(CHOSEN[1],)]).completions[0][-1] == end
    assert encoder(tokenizer, ends=())((ASKED,), [(CHOSEN[1],)]).completions[0][-2:] == [end, eos]


def test_a_template_that_changes_turns_and_ends_them_by_no_control_token_is_refused():
    tokenizer = copy.deepcopy(chats.FORMS["qwen2"]())
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + (': ' if loop.last else '. ') + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    with pytest.raises(ValueError, match="the chat template changes"):
        encoder(tokenizer)((ASKED,), [tuple(CHOSEN[1:])])


# Tools and system messages --------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


def test_tools_reach_the_template_and_calls_are_trained_on_but_not_their_results():
    tokenizer = chats.FORMS["qwen2"]()
    messages = [ASKED, CALL, message("tool", "4"), message("assistant", "It is 4.")]
    record = records.prompt_completion({"messages": messages, "tools": TOOLS})
    found = encoder(tokenizer)(record.prompt, record.completions, template=record.template)
    assert tokenizer.decode(found.prompt).startswith('<|im_start|>system\nTools:\n{"type": "function"')
    called, said = trained(tokenizer, found)
    assert called == '<tool_call>\n{"name": "add"}\n</tool_call><|im_end|>' and said == "It is 4.<|im_end|>"
    with pytest.raises(ValueError, match="tools must be left out, as the chat template does not read it"):
        encoder(chats.FORMS["gemma"]())(record.prompt, [(CHOSEN[1],)], template=record.template)


def test_a_system_entry_is_the_first_message():
    tokenizer = chats.FORMS["qwen2"]()
    for line in ({"prompt": "The king", "completion": "was good."}, {"messages": CHOSEN[:2]}):
        record = records.prompt_completion({"system": "Be rude.", **line})
        found = encoder(tokenizer)(record.prompt, record.completions)
        begins = "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user\nThe king<|im_end|>\n"
        assert tokenizer.decode(found.prompt) == begins + "<|im_start|>assistant\n"
        assert trained(tokenizer, found) == TURNS["qwen2"][:1]


# Strings --------------------------------------------------------------------------------------------------------------


def test_sentencepiece_puts_no_space_before_a_completion():
    tokenizer = chats.llama2()
    assert tokenizer.tokenize("The king was") == ["▁The", "▁king", "▁was"]
    whole = tokenizer("The king was")["input_ids"]
    found = encoder(tokenizer)("The king", [" was", "dom"])
    assert [*found.prompt, *found.completions[0]] == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode([*found.prompt, *found.completions[1]]) == "<s> The kingdom</s>"
    text = encoder(tokenizer)("", ["The king"])
    assert [*text.prompt, *text.completions[0]] == [*whole[:3], tokenizer.eos_token_id], "a text begins with its space"


@pytest.mark.parametrize("form", ["llama2", "llama3"])
def test_a_prompt_or_text_that_holds_bos_has_one(form):
    tokenizer = chats.FORMS[form]()
    bos, encode = tokenizer.bos_token, encoder(tokenizer)
    assert encode(bos + "The king", [" was"]).prompt.count(tokenizer.bos_token_id) == 1
    whole = encode("", [bos + "The king"])
    assert [*whole.prompt, *whole.completions[0]].count(tokenizer.bos_token_id) == 1
    assert encode("", ["The king"]).prompt == [tokenizer.bos_token_id]


def test_an_eos_that_the_tokenizer_puts_after_every_text_does_not_end_a_prompt():
    tokenizer = copy.deepcopy(chats.llama2())
    template = tokenizers.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("The king")["input_ids"][-1] == tokenizer.eos_token_id
    assert encoder(tokenizer)("The king", [" was"]) == encoder(chats.llama2())("The king", [" was"])


def test_without_bos_a_text_is_predicted_from_its_second_token():
    tokenizer = chats.FORMS["qwen2"]()
    assert tokenizer.bos_token_id is None
    found = encoder(tokenizer)("", ["The king was good."])
    tokens = tokenizer("The king was good.")["input_ids"]
    assert (found.prompt, found.completions) == (tokens[:1], [[*tokens[1:], tokenizer.eos_token_id]])


# Length ---------------------------------------------------------------------------------------------------------------


def batches_of(data, kind="prompt-completion", *, on_bad="raise", tokenizer=None, batch_size=1, **options):
    found = records.read(data, KINDS[kind].parse, on_bad=on_bad, check=False)
    made = encoder(tokenizer or chats.FORMS["qwen2"](), **options)
    return Batches(found, KINDS[kind], made, batch_size=batch_size, seed=0)


def test_long_texts_in_chunks_are_predicted_once():
    tokenizer = chats.FORMS["llama3"]()
    long, short = "The king was a good man, and " * 9, "The king"
    data = [{"text": long}, {"text": short}, {"prompt": "The", "completion": " king"}]
    batches = batches_of(data, tokenizer=tokenizer, max_length=16, chunk=True)
    rows = [batches.rows(place) for place in range(len(batches))]
    assert all(len(row.prompt) + len(row.completions[0]) <= 16 and all(row.masks[0]) for row in rows)
    parts = rows[: len(rows) - 2]
    assert len(parts) > 2 and [len(part.prompt) for part in parts] == [1] * len(parts)
    whole = [*tokenizer(long, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert [token for part in parts for token in part.completions[0]] == whole
    before = [tokenizer.bos_token_id, *(part.completions[0][-1] for part in parts[:-1])]
    assert [part.prompt[0] for part in parts] == before, "each part begins with the last token of the one before"
    assert {batches.describe(step) for step in range(batches.order.steps_per_epoch)} == {"row 0", "row 1", "row 2"}
    with pytest.raises(ValueError, match="row 0: a completion of"):
        batches_of(data, tokenizer=tokenizer, max_length=16)


TOO_LONG = [
    {"prompt": "The king", "completion": " was" * 30},
    {"prompt": "The king" * 30, "completion": " was"},
    {"prompt": "The king", "completion": " was"},
]


@pytest.mark.parametrize(
    ("cut", "on_bad", "kept", "bad", "left_out"),
    [
        ("left", "skip", [1, 2], [0], []),
        ("right", "skip", [0, 2], [1], []),
        ("raise", "skip", [2], [0, 1], []),
        ("skip", "raise", [2], [], [0, 1]),
    ],
)
def test_rows_that_do_not_fit_are_named_and_others_are_trained_on(cut, on_bad, kept, bad, left_out):
    batches = batches_of(TOO_LONG, max_length=16, cut=cut, on_bad=on_bad)
    assert batches.data.numbers.tolist() == kept
    assert [each.number for each in batches.bad] == bad and [each.number for each in batches.too_long] == left_out
    assert all("in 16" in each.reason or "longer than 16" in each.reason for each in (*batches.bad, *batches.too_long))


def test_all_bad_rows_are_named_at_once_and_a_file_without_others_is_refused():
    with pytest.raises(ValueError, match=r"data has 2 bad rows: row 0: a prompt .*; row 1: a prompt of"):
        batches_of(TOO_LONG, max_length=16, cut="raise")
    with pytest.raises(ValueError, match=r"data has no records: a prompt of 2 tokens .* longer than 16, as are all"):
        batches_of(TOO_LONG[:1], max_length=16, cut="skip")


def test_one_bad_text_does_not_spoil_those_encoded_with_it():
    data = [
        {"prompt": "The", "completion": " king"},
        {"prompt": "\ud83d", "completion": "x"},
        {"messages": [ASKED] * 2},
    ]
    for given in (data, iter(data)):
        batches = batches_of(given, on_bad="skip")
        assert batches.data.numbers.tolist() == [0] and [each.number for each in batches.bad] == [1, 2]
        assert "half a surrogate pair" in batches.bad[0].reason


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(tmp_path):
    path = tmp_path / "alternate.jsonl"
    lines = [json.dumps({"messages": CHOSEN})] * 2
    lines.insert(1, json.dumps({"messages": [ASKED, ASKED, CHOSEN[1]]}))
    path.write_text("\n".join(lines))
    tokenizer = chats.FORMS["gemma"]()
    with pytest.raises(ValueError, match="line 2: the chat template: Conversation roles must alternate"):
        batches_of(path, tokenizer=tokenizer)
    assert batches_of(path, tokenizer=tokenizer, on_bad="skip").data.numbers.tolist() == [1, 3]


@pytest.mark.parametrize("kind", ["preference", "unpaired-preference"])
def test_others_words_are_never_trained_on_in_preferences(kind):
    pair = {"prompt": [ASKED], "chosen": CHOSEN[1:], "rejected": REJECTED[1:]}
    line = {"prompt": [ASKED], "completion": CHOSEN[1:], "label": True} if kind == "unpaired-preference" else pair
    tokenizer = chats.FORMS["gemma"]()
    row = batches_of([line], kind, tokenizer=tokenizer).rows(0)
    assert trained(tokenizer, row) == TURNS["gemma"]
    with pytest.raises(ValueError, match='train_on must be "all" or "last" here, as a completion holds others\' words'):
        batches_of([line], kind, tokenizer=tokenizer, train_on="completion")


@pytest.mark.parametrize("kind", ["prompt-completion", "preference", "unpaired-preference"])
def test_batches_mark_the_assistants_tokens(kind):
    tokenizer = chats.FORMS["llama3"]()
    lines = {
        "prompt-completion": {"messages": CHOSEN},
        "unpaired-preference": {"messages": CHOSEN, "label": True},
    }.get(kind, {"chosen": CHOSEN, "rejected": REJECTED})
    other = {name: value if name == "label" else [ASKED, *value[1:2]] for name, value in lines.items()}
    batches = batches_of([lines, other], kind, tokenizer=tokenizer, batch_size=2)
    batch, place = batches.collate([0, 1]), {"preference": 0, "unpaired-preference": 0}.get(kind)
    found = batch if place is None else batch[place]
    tokens, marked = (np.asarray(leaf).reshape(-1, leaf.shape[-1])[0] for leaf in (found.tokens, found.completion_mask))
    assert tokenizer.decode(tokens[marked]) == "".join(TURNS["llama3"])
    if kind == "unpaired-preference":  # row 1's prompt with row 0's completion
        tokens, marked = batch.mismatched.tokens[1], batch.mismatched.completion_mask[1]
        assert tokenizer.decode(tokens[marked]) == "".join(TURNS["llama3"])


def test_show_mask_marks_exactly_what_is_trained_on():
    tokenizer = chats.llama2()
    shown = show_mask(tokenizer, encoder(tokenizer)(PAIR.prompt, PAIR.completions))
    first, second = shown.split("\n\n")
    assert first == "<s> [INST] The king [/INST]⟦ was good. </s>⟧<s> [INST] thank you [/INST]⟦ You are welcome. </s>⟧"
    assert "that is wrong" in second.replace("⟦", "|").split("⟧")[1]
    assert show_mask(tokenizer, batches_of([{"prompt": "The king"}], "prompt-only").rows(0)) != ""


# Kept and shared ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache of one's own that keeps everything, and the number of times that something was tokenised."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenised, "SLOW", -1.0)
    counted, real = [], tokenised.tokenise
    monkeypatch.setattr(tokenised, "tokenise", lambda *given, **options: counted.append(1) or real(*given, **options))
    return counted


def test_tokens_are_read_from_the_cache_and_never_stale(tmp_path, kept):
    path, tokenizer = tmp_path / "pairs.jsonl", chats.FORMS["qwen2"]()
    lines = [{"prompt": f"The king {i}", "chosen": " was good", "rejected": " was", "gap": i} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, [*lines[:3], {"prompt": "x"}, *lines[3:]])))

    def made(data=path, kind="preference", changed=tokenizer, room=0, vocab_size=None, **options):
        found = records.read(data, KINDS[kind].parse, on_bad="skip", check=False)
        options = {"room": room, "vocab_size": vocab_size, "batch_size": 1, "seed": 0}, options
        batches = Batches(found, KINDS[kind], encoder(changed, **options[1]), cache=True, fields=True, **options[0])
        assert len(found) == len(batches.data.numbers)
        return batches

    first, again = made(), made()
    assert len(kept) == 1, "the second was read"
    for name in tokenised.ARRAYS:
        np.testing.assert_array_equal(getattr(first.data, name), getattr(again.data, name))
    assert first.data[len(tokenised.ARRAYS) :] == again.data[len(tokenised.ARRAYS) :]
    assert [each.number for each in again.bad] == [4] and again.collate([4]).fields["gap"] == [4.0]
    assert again.records(0) == first.records(0)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["king"])
    template = copy.deepcopy(tokenizer)
    template.chat_template += " "
    changes = [
        {"kind": "ranked"}, {"max_length": 300}, {"cut": "skip"}, {"train_on": "last"}, {"ends": [5]}, {"chunk": True},
        {"room": 3}, {"vocab_size": 9000}, {"changed": other}, {"changed": template},
    ]  # fmt: skip
    for done, change in enumerate(changes, 2):
        made(**change)
        assert len(kept) == done, change
    path.write_text(path.read_text().replace("was good", "was fair"))
    assert tokenizer.decode(made().rows(0).completions[0]) == " was fair<|im_end|>"
    assert len(kept) == len(changes) + 2
    folders = sorted((tmp_path / "cache" / "jaxrl_llm" / "tokens").iterdir())
    assert len(folders) == tokenised.KEPT, "those used last"
    made()
    for folder in folders:
        if (folder / "tokens.npy").exists():
            (folder / "tokens.npy").write_bytes(b"broken")
    made()
    assert len(kept) == len(changes) + 3
    made(data=lines)
    made(data=[*lines[:4], lines[4] | {"chosen": " is"}])
    made(data=[{**line, "odd": {1, 2}} for line in lines]), made(data=[{**line, "odd": {1, 2}} for line in lines])
    assert len(kept) == len(changes) + 7, "what JSON cannot hold has no key"


def test_fast_runs_are_not_kept(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(tokenised, "SLOW", 60.0)
    found = records.read([{"text": "The king"}], KINDS["prompt-completion"].parse, check=False)
    made = encoder(chats.FORMS["qwen2"]())
    Batches(found, KINDS["prompt-completion"], made, batch_size=1, seed=0, cache=True)
    assert len(kept) == 1 and not (tmp_path / "cache").exists()


def test_parts_are_joined_as_one_is_made(monkeypatch):
    data = [
        *TOO_LONG,
        {"text": "The king was"},
        {"prompt": 3},
        *({"prompt": "A", "completion": " b", "n": i} for i in "12"),
    ]
    data += [{"prompt": "A", "completion": " b", "n": i, "m": 0.5} for i in range(3)]
    whole = batches_of(data, on_bad="skip", max_length=16)
    monkeypatch.setattr(tokenised, "PART", 2)
    parts = batches_of(data, on_bad="skip", max_length=16)
    for name, one, other in zip(whole.data._fields, whole.data, parts.data, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
    assert whole.unread == {"m": 3, "n": 5} and whole.data.cut_prompts == 1


@pytest.mark.slow
def test_other_processes_give_the_same_tokens(monkeypatch):
    data = [{"messages": [message("user", f"The king {i}"), CHOSEN[1]], "n": i} for i in range(40)]
    alone = batches_of(data)
    monkeypatch.setattr(tokenised, "PART", 4)
    monkeypatch.setattr(tokenised, "ALONE", -1.0)
    monkeypatch.setattr(tokenised, "_cores", lambda: 2)
    for name, one, other in zip(alone.data._fields, alone.data, batches_of(data).data, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)

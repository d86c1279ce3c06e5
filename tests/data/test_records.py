"""The formats of a line, and files and lists of them: every bad line is named."""

import csv
import json
import os
import sys
import types

import numpy as np
import pytest

from jaxrl_llm.data import records
from jaxrl_llm.data.records import JsonLines, Preference, Prompt, PromptCompletion, Ranked, UnpairedPreference

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "Hi"), ("assistant", "Hello"), ("assistant", "No")))  # fmt: skip
SYSTEM, RESULT = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "4"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARSE = {
    "prompt": records.prompt,
    "completion": records.prompt_completion,
    "preference": records.preference,
    "unpaired": records.unpaired_preference,
    "ranked": records.ranked,
}
PAIR = Preference((USER,), (GOOD,), (BAD,))


@pytest.mark.parametrize(
    ("kind", "line", "record"),
    [
        ("prompt", {"prompt": "a", "gold": 7}, Prompt("a", {"gold": 7})),
        ("completion", {"prompt": "a", "answer": "b"}, PromptCompletion("a", "b")),
        ("completion", {"prompt": "a", "completion": "b"}, PromptCompletion("a", "b")),
        ("completion", {"text": "b"}, PromptCompletion("", "b")),
        ("completion", {"messages": [USER, GOOD]}, PromptCompletion((USER,), (GOOD,))),
        ("completion", {"prompt": "Hi", "messages": [USER, GOOD]}, PromptCompletion((USER,), (GOOD,))),
        ("completion", {"prompt": "Hi", "answer": [USER, GOOD]}, PromptCompletion((USER,), (GOOD,))),
        ("preference", {"prompt": "", "chosen": "b", "rejected": "c"}, Preference("", "b", "c")),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "m": 2}, Preference("a", "b", "c", {"m": 2})),
        ("preference", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
        ("preference", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR),
        # Strings and messages mixed, UltraFeedback's form among them: the whole conversations begin with the prompt.
        *(
            ("preference", {"prompt": asked, "chosen": chosen, "rejected": rejected}, PAIR)
            for asked in ("Hi", [USER])
            for chosen, rejected in [
                ("Hello", [BAD]),
                ([GOOD], "No"),
                ([USER, GOOD], [USER, BAD]),
                ([USER, GOOD], "No"),
            ]
        ),
        ("unpaired", {"prompt": [USER], "answer": "No", "label": 0}, UnpairedPreference((USER,), (BAD,), False)),
        ("unpaired", {"prompt": "a", "completion": "b", "label": False}, UnpairedPreference("a", "b", False)),
        ("unpaired", {"text": "b", "label": 1}, UnpairedPreference("", "b", True)),
        ("preference", {"chosen": "The king was", "rejected": "The king  is"}, Preference("The king", " was", "  is")),
        ("preference", {"chosen": "The king", "rejected": "The kind man"}, Preference("The", " king", " kind man")),
        ("preference", {"chosen": "a b", "rejected": "a b c", "prompt": None}, Preference("a", " b", " b c")),
        ("preference", {"prompt": "Hi", "chosen": GOOD, "rejected": BAD}, PAIR),
        # ShareGPT's form, and its preferences.
        ("completion", {"conversations": SHARED}, PromptCompletion((USER,), (GOOD,))),
        ("completion", {"conversations": [USER, GOOD]}, PromptCompletion((USER,), (GOOD,))),
        ("preference", {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": BAD}, PAIR),
        # Alpaca's form, as a prompt that Taori et al. published.
        (
            "completion",
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            PromptCompletion(
                "Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.\n\n"
                "### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:",
                "4",
            ),
        ),
        # Entries for the chat template, and null as if it were not there.
        (
            "completion",
            {"prompt": "Hi", "completion": "Hello", "system": "Be brief.", "answer": None},
            PromptCompletion((SYSTEM, USER), (GOOD,)),
        ),
        (
            "completion",
            {"prompt": "Hi", "answer": [SYSTEM, USER, GOOD], "system": "Be brief."},
            PromptCompletion((SYSTEM, USER), (GOOD,)),
        ),
        (
            "completion",
            {"messages": [USER, CALL, RESULT, GOOD], "tools": "[{}]"},
            PromptCompletion((USER,), (CALL, RESULT, GOOD), {}, {"tools": [{}]}),
        ),
        (
            "completion",
            {"messages": [USER, CALL | {"content": None}, RESULT, GOOD | {"tool_calls": None}]},
            PromptCompletion((USER,), (CALL, RESULT, GOOD)),
        ),
        (
            "prompt",
            {"prompt": "Hi", "chat_template_kwargs": {"enable_thinking": False}},
            Prompt((USER,), {"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ),
        # What a format does not know is kept, to be counted.
        ("completion", {"prompt": "a", "answer": "b", "wieght": 3}, PromptCompletion("a", "b", {"wieght": 3})),
        ("unpaired", {"text": "b", "label": 1, "id": "x"}, UnpairedPreference("", "b", True, {"id": "x"})),
        ("ranked", {"prompt": "Hi", "answers": ["Hello", [USER, BAD]]}, Ranked((USER,), ((GOOD,), (BAD,)), (0, 1))),
        ("ranked", {"prompt": "a", "answers": ["x", "y", "z"]}, Ranked("a", ("x", "y", "z"), (0, 1, 2))),
        ("ranked", {"prompt": "a", "answers": ["x", "y"], "ranks": [1, 0]}, Ranked("a", ("x", "y"), (1, 0))),
        ("ranked", {"prompt": "a", "chosen": "x", "rejected": "y"}, Ranked("a", ("x", "y"), (0, 1))),
    ],
)
def test_a_line_is_parsed(kind, line, record):
    assert PARSE[kind](line) == record


@pytest.mark.parametrize(
    ("kind", "line", "said"),
    [
        ("prompt", {}, "prompt is missing: it has nothing"),
        ("prompt", {"prompt": 3}, 'must be a string or a list of {"role", "content"}, but is'),
        ("prompt", {"prompt": [{"role": "user"}]}, "must be a string or a list"),
        ("completion", {"prompt": "a", "answer": ""}, "answer is empty"),
        ("completion", {"prompt": "a"}, "completion is missing: it has prompt"),
        ("completion", {"messages": [USER]}, "must end with one of the assistant"),
        ("completion", {"messages": [GOOD]}, "one before the assistant's last"),
        ("completion", {"text": [GOOD]}, "text must be a string"),
        ("completion", {"prompt": "a", "completion": "b", "text": "ab"}, "one format, but has text and completion"),
        ("completion", {"messages": [USER, GOOD], "answer": "b"}, "one format, but has messages and answer"),
        ("unpaired", {"prompt": "a", "text": "b", "label": True}, "one format, but has text and prompt"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same completion"),
        (
            "preference",
            {"chosen": "b", "rejected": "c"},
            "common beginning of the two strings, but there is neither",
        ),
        ("preference", {"chosen": [GOOD], "rejected": [BAD]}, "or a common beginning of the two conversations"),
        ("preference", {"prompt": "a", "chosen": "b"}, "rejected is missing"),
        ("preference", {"prompt": "Hi", "chosen": "No", "rejected": [USER, BAD]}, "are the same completion"),
        ("preference", {"prompt": "Who?", "chosen": [USER, GOOD], "rejected": "No"}, "one of the role 'user'"),
        ("preference", {"prompt": "", "chosen": [GOOD], "rejected": [BAD]}, "prompt is empty"),
        ("completion", {"prompt": "a", "completion": "b", "answer": "b"}, "completion and answer, which are synonyms"),
        ("completion", {"messages": [USER, GOOD], "conversations": SHARED}, "which are synonyms: leave one out"),
        ("completion", {"conversations": [{"from": "narrator", "value": "x"}]}, "from must be one of human, user, gpt"),
        ("completion", {"prompt": "Who?", "messages": [USER, GOOD]}, "messages must begin with the prompt"),
        ("completion", {"messages": [USER, {"role": "assistant", "content": ""}]}, "assistant's message in the"),
        ("completion", {"messages": [USER, {"role": "assistant", "content": None}]}, "must be a string or a list"),
        ("completion", {"prompt": "Hi", "answer": [GOOD, USER]}, "must end with the assistant's message"),
        ("completion", {"messages": [SYSTEM, USER, GOOD], "system": "x"}, "begin with a system message too"),
        ("completion", {"prompt": "a", "answer": "b", "system": ["x"]}, "system must be a string, but is"),
        (
            "completion",
            {"messages": [USER, GOOD], "tools": "add"},
            "tools must be a list of JSON schemas, but is 'add'",
        ),
        ("completion", {"instruction": 3, "output": "x"}, "instruction and input must be strings"),
        ("unpaired", {"text": "b", "label": "yes"}, "label must be true or false, but is 'yes'"),
        ("unpaired", {"text": "b"}, "label must be true or false, but is None"),
        ("ranked", {"prompt": "a", "answers": ["x"]}, "two or more"),
        ("ranked", {"prompt": "a", "answers": ["x", "y"], "ranks": [0]}, "an integer from 0 for each of 2 answers"),
        ("ranked", {"prompt": "a", "answers": ["x", "y"], "ranks": [1, 1]}, "all ranks are equal"),
        ("ranked", {"prompt": "a", "answers": ["x", "y", "x"]}, "answer 3 occurs twice"),
        ("ranked", {"prompt": "Hi", "answers": ["No", [USER, BAD]]}, "answer 2 occurs twice"),
    ],
)
def test_a_line_that_is_not_a_record_is_refused(kind, line, said):
    with pytest.raises(ValueError) as error:
        PARSE[kind](line)
    assert said in str(error.value)


# Files ----------------------------------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_records_are_read_in_any_order_and_blank_lines_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "\xc3\xa4"}', b"", {"prompt": "b", "answer": 7}, b"  ")
    found = JsonLines(path, records.prompt).check()
    assert len(found) == 2
    assert found[1] == Prompt("b", {"answer": 7}) and found[0] == Prompt("ä")
    assert found.numbers == [1, 3]
    assert [each.prompt for each in found] == ["ä", "b"] and found[-1] == found[1] and found[:1] == [found[0]]
    before = found.digest()
    path.write_text('{"prompt": "two"}')
    assert found[0].prompt == "two", "nothing of the records is kept"
    assert found.digest() != before


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [{"prompt": "x"}, b"{", b"", b"[1]", {"question": 1}, b'{"prompt": "\xff"}'],
            [
                "a.jsonl has 4 bad lines",
                "line 2: it is not JSON",
                "line 4: it must be a JSON object, but is a list",
                "line 5: prompt is missing: it has question",
                "line 6: it is not UTF-8",
            ],
        ),
        (
            [{"prompt": "x"}, b'{"prompt": "a\\uD83D"}', b'{"prompt": "a", "\\ude00": 1}'],
            ["line 2: it holds \\ud83d, half a surrogate pair", "; line 3: it holds \\ude00"],
        ),
        ([b'[{"prompt": "x"}]'], ["bad line: ", "; there must be one JSON object per line"]),
        ([b"[", b' {"prompt": "x"}', b"]"], ["bad lines: "]),
        ([{"question": 1}], ["is missing: it has question"]),
        ([b'{"prompt": "\t"}'], ["it is not JSON: Invalid control character at character 13"]),
        ([b'{"prompt": "a", "prompt": "b"}'], ["it has the key 'prompt' more than once"]),
        ([b"x"] * 9, ["has 9 bad lines: line 1: ", "; and 4 more"]),
        ([b""], ["has no records"]),
    ],
)
def test_bad_lines_are_named_by_number_with_their_reason(tmp_path, lines, said):
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(ValueError) as error:
        JsonLines(path, records.prompt).check()
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = write(tmp_path / "good.jsonl", b'{"prompt": "\\ud83d\\ude00"}')
    assert JsonLines(path, records.prompt).check()[0].prompt == "\U0001f600"


def test_bad_lines_can_be_skipped_and_are_kept_for_the_report(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{", *[{"prompt": str(i)} for i in range(3)], b"null")
    found = JsonLines(path, records.prompt, on_bad="skip")
    assert [each.prompt for each in found] == ["0", "1", "2"]
    assert [bad.number for bad in found.bad_lines] == [1, 5]
    with pytest.raises(ValueError, match=r"has no records: .* has 1 bad line: line 1: it is not JSON"):
        JsonLines(write(path, b"x"), records.prompt, on_bad="skip").check()


DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def test_a_line_that_is_nested_too_deeply_is_a_bad_line(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "x"}, DEEP)
    with pytest.raises(ValueError, match="line 2: it is nested too deeply"):
        records.read(path, records.prompt)


ROWS = [{"prompt": "Hi, you", "answers": ["a", "b"], "gold": 7}, {"prompt": "12", "answers": ["c", "d"], "gold": 0.5}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps(ROWS, indent=1)),
        ("b.json", "\n".join(map(json.dumps, ROWS))),
        ("c.csv", '\ufeffprompt,answers,gold\n"Hi, you","[""a"", ""b""]",7\n12,"[""c"", ""d""]",0.5\n'),
        ("d.TSV", 'prompt\tanswers\tgold\nHi, you\t"[""a"", ""b""]"\t7\n12\t"[""c"", ""d""]"\t0.5\n'),
    ],
)
def test_other_files_hold_the_same_records(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    found = records.read(path, records.ranked)
    assert list(found) == [records.ranked(row) for row in ROWS]
    before = found.digest()
    path.write_text(text.replace("Hi", "Ho"))
    assert records.read(path, records.ranked).digest() != before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '[{"prompt": "x"}', "a.json is not a JSON list: Expecting"),
        ("a.json", '[{"prompt": "x"}, {"question": 1}]', "has 1 bad row: row 1: prompt is missing: it has question"),
        ("a.csv", "prompt,gold\nx\n", "a.csv must have 2 cells in each row, but has 1 in line 2"),
        ("a.csv", "prompt,prompt\nx,y\n", "a.csv has a column more than once: prompt, prompt"),
        ("a.csv", "", "a.csv has no records"),
        ("a.csv", 'prompt\n"x\n', "a.csv is not a table of comma-separated values: unexpected end of data"),
    ],
)
def test_other_files_that_cannot_be_read_are_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        records.read(tmp_path / name, records.prompt)
    assert said in str(error.value)


def test_a_folder_and_a_pipe_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a file, but is a folder"):
        records.read(tmp_path, records.prompt)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe must be a file, which is read more than once, but is a pipe"):
        records.read(tmp_path / "pipe", records.prompt)


@pytest.mark.parametrize("written", [json.dumps, str])  # pandas writes a list of dicts as Python does
def test_messages_in_the_cells_of_a_table_are_not_text(tmp_path, written):
    row = {"prompt": [{"role": "user", "content": "it's [{1}]"}]}
    row |= {side: [{"role": "assistant", "content": side, "name": None}] for side in ("chosen", "rejected")}
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row, [written(cell) for cell in row.values()]])
    assert list(records.read(tmp_path / "a.csv", records.preference)) == [records.preference(row)]


def test_cells_of_messages_that_cannot_be_read_are_bad_rows_and_other_brackets_are_text(tmp_path):
    path = write(tmp_path / "a.csv", b"text\n\"[{'role': 'user'} {'role': 'user'}]\"\n[{'x': 1}]\n[1]\n")
    found = records.read(path, records.prompt_completion, on_bad="skip")
    assert [each.completion for each in found] == ["[{'x': 1}]", "[1]"]
    assert [bad.number for bad in found.bad_lines] == [0]


def test_parquet_needs_pyarrow_and_its_rows_are_read_through_it(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxrl_llm\[parquet\]'"):
        records.read(path, records.prompt)
    with pytest.raises(FileNotFoundError):
        records.read(tmp_path / "none.parquet", records.prompt)
    rows = [{"prompt": "x", "tools": None}, {"prompt": None}]
    table = types.SimpleNamespace(to_pylist=lambda: rows)
    arrow = types.ModuleType("pyarrow")
    arrow.parquet = types.SimpleNamespace(read_table=lambda path: table)
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    with pytest.raises(ValueError, match="row 1: prompt is missing: it has nothing"):
        records.read(path, records.prompt)
    assert records.read(path, records.prompt, on_bad="skip")[0] == Prompt("x")


# Lists and what is neither --------------------------------------------------------------------------------------------


def test_dicts_in_memory_are_records_too():
    rows = [{"text": "b", "label": np.bool_(True)}, {"text": ""}, {"text": "c", "label": np.int64(0)}]
    found = records.read(iter(rows), records.unpaired_preference, on_bad="skip")
    assert list(found) == [UnpairedPreference("", "b", True), UnpairedPreference("", "c", False)]
    assert found.numbers == [0, 2] and [bad.number for bad in found.bad_lines] == [1]
    assert found.digest() != records.read(rows[:1], records.unpaired_preference).digest()


def test_arrays_in_rows_are_lists():
    """As pandas reads lists from Parquet files."""
    answers, scores = ["a", "b"], list(range(2000))
    row = {"prompt": [{"role": "user", "content": "x"}], "answers": answers, "ranks": [1, 0], "scores": scores}
    arrays = {name: np.asarray(value) for name, value in row.items()}
    found = records.read([arrays], records.ranked)
    assert list(found) == [records.ranked(row)]
    other = arrays | {"scores": np.asarray([*scores[:1000], 0, *scores[1001:]])}
    assert found.digest() != records.read([other], records.ranked).digest()


def test_a_label_may_be_a_whole_float():
    """As pandas reads true and false of a column with gaps."""
    rows = [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}]
    assert [each.label for each in records.read(rows, records.unpaired_preference)] == [True, False]


def test_a_table_is_refused_with_what_to_give_instead():
    class DataFrame(dict):
        columns, to_dict = ("prompt",), dict

    with pytest.raises(TypeError, match=r"prompts must be .* but is a DataFrame: give its rows, as to_dict"):
        records.read(DataFrame(), records.prompt, name="prompts")


class Dataset:
    """As `datasets.Dataset`: a length, and a dict at each index, whose columns are those of all rows."""

    def __len__(self):
        return 3

    def __getitem__(self, place):
        if not isinstance(place, int) or not 0 <= place < 3:
            raise IndexError(place)
        return {"prompt": f"Say {place}", "completion": None if place == 1 else "x", "messages": None}


def test_a_dataset_is_read_row_by_row_and_null_is_nothing():
    found = records.read(Dataset(), records.prompt_completion, on_bad="skip")
    assert list(found) == [PromptCompletion("Say 0", "x"), PromptCompletion("Say 2", "x")]
    assert [bad.reason for bad in found.bad_lines] == ["completion is missing: it has prompt"]
    assert len(found.digest()) == 64


def test_alpacas_form_is_a_users_message_for_a_chat_model():
    line = records.canonical({"instruction": "Add.", "input": "2, 2", "output": "4", "id": 1}, chat=True)
    assert line == {"prompt": [{"role": "user", "content": "Add.\n\n2, 2"}], "completion": "4", "id": 1}


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ("none.jsonl", FileNotFoundError, "none.jsonl"),
        (None, TypeError, "data must be a path or an iterable of dicts, but is a NoneType"),
        ({"prompt": ["a"]}, TypeError, "data must be a path or an iterable of dicts, but is a dict"),
        ([], ValueError, "data has no records"),
        ([{"prompt": "a"}, {"question": 1}, "b"], ValueError, "data has 2 bad rows: row 1: prompt is missing"),
        ([{"prompt": "a"}, {"question": 1}, "b"], ValueError, "row 2: it must be a dict, but is a str"),
    ],
)
def test_other_data_are_refused(data, error, said):
    with pytest.raises(error, match=said):
        records.read(data, records.prompt)


def test_other_choices_are_refused():
    with pytest.raises(ValueError, match='on_bad must be "raise" or "skip", but is \'drop\''):
        records.read([{"prompt": "x"}], records.prompt, on_bad="drop")

"""Files of JSON lines: read when asked for, and every bad line named."""

import json

import pytest

from jaxrl_llm.data import records
from jaxrl_llm.data.jsonl import JsonLines


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_records_are_read_in_any_order_and_blank_lines_are_none(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "\xc3\xa4"}', b"", {"prompt": "b", "answer": 7}, b"  ")
    found = JsonLines(path, records.prompt)
    assert len(found) == 2
    assert found[1] == records.Prompt("b", {"answer": 7}) and found[0] == records.Prompt("ä")
    assert (found.line(0), found.line(1)) == (1, 3)
    assert [each.prompt for each in found] == ["ä", "b"] and found[-1] == found[1] and found[:1] == [found[0]]


def test_nothing_of_the_records_is_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "one"})
    found = JsonLines(path, records.prompt)
    path.write_text('{"prompt": "two"}')
    assert found[0].prompt == "two"


def test_bad_lines_are_named_by_number_with_their_reason(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "x"}, b"{", b"", b"[1]", {"question": 1}, b'{"prompt": "\xff"}')
    with pytest.raises(ValueError) as error:
        JsonLines(path, records.prompt)
    said = str(error.value)
    assert "has 4 bad lines" in said and str(path) in said
    for part in ("line 2: it is not JSON", "line 4: it must be a JSON object, but is a list",
                 "line 5: prompt is missing: there are question", "line 6: it is not UTF-8"):  # fmt: skip
        assert part in said


def test_half_a_surrogate_pair_is_a_bad_line_and_a_whole_one_is_not(tmp_path):
    good, bad = b'{"prompt": "\\ud83d\\ude00"}', b'{"prompt": "a\\uD83D"}'
    assert JsonLines(write(tmp_path / "good.jsonl", good), records.prompt)[0].prompt == "\U0001f600"
    key = b'{"prompt": "a", "\\ude00": 1}'
    with pytest.raises(
        ValueError, match=r"line 2: it holds \\ud83d, half a surrogate pair.*; line 3: it holds \\ude00"
    ):
        JsonLines(write(tmp_path / "bad.jsonl", good, bad, key), records.prompt)


@pytest.mark.parametrize("indent", [None, 1])
def test_json_that_is_no_lines_says_so(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "x"}], indent=indent))
    with pytest.raises(ValueError, match=r"bad lines?: .*; there must be one JSON object per line$"):
        JsonLines(path, records.prompt)
    with pytest.raises(ValueError, match=r"is missing: there are question$"):
        JsonLines(write(path, {"question": 1}), records.prompt)
    with pytest.raises(ValueError, match=r"it is not JSON: Invalid control character at character 13"):
        JsonLines(write(path, b'{"prompt": "\t"}'), records.prompt)


def test_bad_lines_can_be_skipped_and_are_kept_for_the_report(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{", *[{"prompt": str(i)} for i in range(3)], b"null")
    found = JsonLines(path, records.prompt, on_bad="skip")
    assert [each.prompt for each in found] == ["0", "1", "2"]
    assert [bad.number for bad in found.bad_lines] == [1, 5]


def test_many_bad_lines_are_counted(tmp_path):
    with pytest.raises(ValueError, match=r"has 9 bad lines: line 1: .*; and 4 more"):
        JsonLines(write(tmp_path / "a.jsonl", *[b"x"] * 9), records.prompt)


@pytest.mark.parametrize(("content", "on_bad"), [([b""], "raise"), ([b"x"], "skip")])
def test_a_file_without_records_is_refused(tmp_path, content, on_bad):
    with pytest.raises(ValueError, match="holds no record"):
        JsonLines(write(tmp_path / "a.jsonl", *content), records.prompt, on_bad=on_bad)


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        JsonLines(tmp_path / "none.jsonl", records.prompt)
    with pytest.raises(ValueError, match='on_bad must be "raise" or "skip", but is \'drop\''):
        JsonLines(write(tmp_path / "a.jsonl", {"prompt": "x"}), records.prompt, on_bad="drop")

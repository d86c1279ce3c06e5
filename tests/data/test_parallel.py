import json

import pytest

from jaxrl_llm.data.parallel import SentencePair, read_pairs

PAIRS = [SentencePair("Good day.", "¡Buenos días!"), SentencePair("A line\u2028of one.", "Una línea.")]


def write(path, *lines, end="\n"):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else (line + end).encode() for line in lines))
    return path


def test_two_files(tmp_path):
    source = write(tmp_path / "a.en", *(pair.source for pair in PAIRS))
    target = write(tmp_path / "a.es", *(f" {pair.target}" for pair in PAIRS), end="\r\n")
    assert read_pairs(source, target) == PAIRS
    assert read_pairs(str(source), str(target)) == PAIRS


def test_one_file_of_either_kind(tmp_path):
    table = write(tmp_path / "a.tsv", *("\t".join(pair) for pair in PAIRS))
    assert read_pairs(table) == PAIRS
    rows = [{"source": pair.source, "target": pair.target, "id": 3} for pair in PAIRS]
    assert read_pairs(write(tmp_path / "a.jsonl", *map(json.dumps, rows))) == PAIRS
    nested = [{"translation": {"en": pair.source, "es": pair.target}} for pair in PAIRS]
    path = write(tmp_path / "b.jsonl", *(json.dumps(row, ensure_ascii=False) for row in nested))
    assert read_pairs(path, source_field="translation.en", target_field="translation.es") == PAIRS


def test_the_last_line_feed_and_a_byte_order_mark_do_not_matter(tmp_path):
    write(tmp_path / "a", b"\xef\xbb\xbfone\ntwo")
    write(tmp_path / "b", "uno", "dos")
    assert read_pairs(tmp_path / "a", tmp_path / "b") == [("one", "uno"), ("two", "dos")]


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (["a", "b"], ["c"], r"a\.en has 2 lines, but .*a\.es has 1\."),
        (["a"], ["c", "d", "e"], r"a\.en has 1 lines, but .*a\.es has 3\."),
        (["a", "b"], ["c", " \t"], r"line 2 of .*a\.es is empty"),
        (["", "b"], ["c", "d"], r"line 1 of .*a\.en is empty"),
        (["a", "b", ""], ["c", "d", ""], r"line 3 of .*a\.en is empty"),
        (
            ["a", b"caf\xe9 y\n"],
            ["c", "d"],
            r"line 2 of .*a\.en must be UTF-8, but has invalid continuation byte at its byte 3",
        ),
        ([], ["c"], r"a\.en is empty"),
    ],
)
def test_two_files_that_do_not_fit(tmp_path, ours, theirs, message):
    files = write(tmp_path / "a.en", *ours), write(tmp_path / "a.es", *theirs)
    with pytest.raises(ValueError, match=message):
        read_pairs(*files)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.tsv", ["a\tb", "a\tb\tc"], r"line 2 of .*a\.tsv must have 2 columns with a tab between them, but has 3"),
        ("a.tsv", ["a b"], r"line 1 of .*a\.tsv must have 2 columns with a tab between them, but has 1"),
        ("a.tsv", ["a\tb", "a\t "], r"column 2 of line 2 of .*a\.tsv is empty"),
        ("a.tsv", ["a\tb", ""], r"line 2 of .*a\.tsv must have 2 columns"),
        (
            "a.tsv",
            ["a\tb", b"\xff\tb\n"],
            r"line 2 of .*a\.tsv must be UTF-8, but has invalid start byte at its byte 0",
        ),
        ("a.jsonl", ["{"], r"line 1 of .*a\.jsonl is not JSON: Expecting property name"),
        ("a.jsonl", ['{"source": "a"}'], r"line 1 of .*a\.jsonl has no field 'target': \{\"source\": \"a\"\}"),
        ("a.jsonl", ['["a", "b"]'], r"line 1 of .*a\.jsonl has no field 'source'"),
        ("a.jsonl", ['{"source": 3, "target": "b"}'], r"'source' in line 1 of .* must be a sentence, but is 3"),
        ("a.jsonl", ['{"source": "a", "target": ""}'], r"'target' in line 1 of .*a\.jsonl is empty"),
        ("a.txt", ["a"], r"a\.txt must end in \.tsv or \.jsonl, or come with a second file"),
    ],
)
def test_one_file_that_is_not_what_it_should_be(tmp_path, name, lines, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / name, *lines))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.es must be a file, but does not exist"):
        read_pairs(write(tmp_path / "a.en", "a"), tmp_path / "b.es")

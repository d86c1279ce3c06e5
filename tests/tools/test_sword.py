import struct

import pytest

from tests.tools.sword_modules import write_blocks, write_module
from tools import sword


def test_blocks_that_do_not_fit_their_index(tmp_path):
    index, packed = write_blocks(tmp_path, "ot", ["one", "two, or møre"])
    assert sword.read_blocks(index, packed) == [b"one", "two, or møre".encode()]
    with pytest.raises(ValueError, match="12 bytes per block, but has 23 bytes: it is truncated"):
        sword.read_blocks(index[:-1], packed)
    with pytest.raises(ValueError, match="the block at 0 must have 4 bytes, but has 3"):
        sword.read_blocks(index[:8] + struct.pack("<I", 4), packed)
    with pytest.raises(ValueError, match=r"the block at 11 cannot be decompressed: .*incomplete or truncated"):
        sword.read_blocks(index, packed[:-1])


BOOKS = {
    "Gen": [["In the beginning.", "", 'And <w lemma="x">the earth</w>.'], ["Thus.<note>n</note>"]],
    "Exod": [["Ñandú ¿á?"], ["Now.", "Él."]],
}
NEW = {"3John": [["The elder."]], "Rev": [["After this."]]}


def test_verses_by_chapter_and_number(tmp_path):
    write_module(tmp_path / "texts", "nt", NEW)
    write_module(tmp_path / "texts", "ot", BOOKS)
    verses = sword.read_verses(tmp_path)
    assert list(verses) == [
        *[("Gen.1", 1), ("Gen.1", 2), ("Gen.1", 3), ("Gen.2", 1), ("Exod.1", 1), ("Exod.2", 1), ("Exod.2", 2)],
        *[("3John.1", 1), ("Rev.1", 1)],
    ]
    assert verses["Gen.1", 1] == "In the beginning." and verses["Gen.1", 2] == ""
    assert verses["Gen.1", 3] == 'And <w lemma="x">the earth</w>.'
    assert verses["Gen.2", 1].startswith('Thus.<note>n</note><chapter eID="Gen.2"/>')
    assert verses["Exod.1", 1] == "Ñandú ¿á?"
    assert verses["3John.1", 1].startswith("The elder.")


def test_the_heading_of_a_chapter_comes_before_its_first_verse(tmp_path):
    write_module(tmp_path, "ot", {"Ps": [["one", "two"]]})
    data = (tmp_path / "ot.bzv").read_bytes()
    heading, first = (list(struct.iter_unpack("<IIH", data))[place] for place in (3, 4))
    longer = struct.pack("<IIH", *heading[:2], heading[2] + first[2])  # the chapter's entry ends after "one"
    (tmp_path / "ot.bzv").write_bytes(data[:30] + longer + data[40:])
    assert sword.read_verses(tmp_path)["Ps.1", 1] == "oneone"


def test_chapters_that_do_not_run_are_refused(tmp_path):
    write_module(tmp_path, "ot", {"Gen": [["a"], ["b"]]})
    data = (tmp_path / "ot.bzv").read_bytes()
    (tmp_path / "ot.bzv").write_bytes(data[:30] + data[50:])  # without chapter 1
    with pytest.raises(ValueError, match=r"after the heading chapter 1 of Gen was expected, but not Gen.2"):
        sword.read_verses(tmp_path)
    (tmp_path / "ot.bzv").write_bytes(data + data[50:])
    with pytest.raises(ValueError, match=r"after Gen.2 chapter 3 of Gen was expected, but not Gen.2"):
        sword.read_verses(tmp_path)


def test_entries_that_do_not_fit_are_refused(tmp_path):
    write_module(tmp_path, "ot", {"Gen": [["a"]]})
    data = (tmp_path / "ot.bzv").read_bytes()
    (tmp_path / "ot.bzv").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="10 bytes per entry, but has 49 bytes: it is truncated"):
        sword.read_verses(tmp_path)
    for entry in ((1, 0, 60_000), (2, 0, 1)):
        (tmp_path / "ot.bzv").write_bytes(data + struct.pack("<IIH", *entry))
        with pytest.raises(ValueError, match=f"entry 5 of the .bzv index lies outside of block {entry[0]}"):
            sword.read_verses(tmp_path)


def test_chapters_as_a_whole(tmp_path):
    write_module(tmp_path, "ot", BOOKS)
    chapters = dict(sword.read_chapters(tmp_path))
    assert list(chapters) == ["Gen.1", "Gen.2", "Exod.1", "Exod.2"]
    assert sword.plain_osis(chapters["Gen.1"]) == "In the beginning.And the earth."

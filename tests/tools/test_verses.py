import os

import pytest

from jaxrl_llm.data.verses import VersePair, unpack
from tests.tools.sword_modules import write_module
from tools import verses as builder
from tools.verses import align, plain_verse, without_initial_capitals

# Plain text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ('<w lemma="strong:H1">In the</w>  <w>beginning</w>\n<chapter eID="Gen.1"/>', "In the beginning"),
        ('LORD.<note placement="foot"><reference>1.1 </reference>or, <i>x</i></note> Amen. ', "LORD. Amen."),
        (
            '<title canonical="true" type="psalm">A Psalm of David.</title> <l sID="1"/>I will',
            "A Psalm of David. I will",
        ),
        ('<q who="Jesus" marker="">Blessed <seg type="x-nested">are</seg></q>', "Blessed are"),
        ("<title><foreign>\u05d1 BETH.</foreign></title> Wherewithal", "BETH. Wherewithal"),
        ("\u00b6 The day\u2019s &quot;so&quot; &amp; \\nd LORD\\nd* is", 'The day\'s "so" & LORD is'),
        ("\u00bfQui\u00e9n? \u00f1 <divineName>Jehov\u00e1</divineName>", "¿Quién? ñ Jehová"),
        ("", ""),
    ],
)
def test_tags_and_notes_go_and_titles_stay(markup, plain):
    assert plain_verse(markup) == plain


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("hay allí+también+<w>bdelio</w>", "hay allí también bdelio"),
        ("enviada+por medio de+Febe", "enviada por medio de Febe"),
        ("<w>madre</w> +fué+, y", "madre fué, y"),
        ("Júrame+lo+ en este día", "Júramelo en este día"),
        ("Dígan+lo+los redimidos", "Díganlo los redimidos"),
        ("manifestaré+lo aún+;", "manifestarélo aún;"),
        ("como+lo+oímos", "como lo oímos"),
        ("si Dios+lo+permitiere", "si Dios lo permitiere"),
        ("de +los+", "de los"),
    ],
)
def test_added_words_stand_apart_unless_they_are_part_of_a_verb(markup, plain):
    for piece in ('<transChange type="added">', "</transChange>") * 2:
        markup = markup.replace("+", piece, 1)
    assert plain_verse(markup) == plain


def test_capitals_at_the_start_of_a_chapter():
    verses = {
        ("A.1", 1): "EN el principio, JEHOVÁ dijo á Jehová, y á Jehová",
        ("A.1", 2): "SANTIDAD Á JEHOVÁ.",
        ("A.2", 1): "Y HABLÓ Jehová á Jehová: ¡OH rey!",
        ("A.3", 1): "Salmo de David. A TI, oh Dios",
        ("A.4", 1): "Á JEHOVÁ llamé; Y Él",
        ("A.5", 1): "¿POR qué?",
    }
    assert list(without_initial_capitals(verses).values()) == [
        "En el principio, Jehová dijo á Jehová, y á Jehová",
        "SANTIDAD Á JEHOVÁ.",
        "Y habló Jehová á Jehová: ¡Oh rey!",
        "Salmo de David. A ti, oh Dios",
        "Á Jehová llamé; Y Él",
        "¿Por qué?",
    ]


# Which verse belongs to which -----------------------------------------------------------------------------------------


def texts(*chapters):
    return {(name, verse): f"{name}:{verse}" for name, size in chapters for verse in range(1, size + 1)}


def test_equal_numbers_are_pairs():
    verses = texts(("Gen.1", 2), ("3John.1", 1))
    assert align(verses, verses) == [
        VersePair("Gen 1:1", "Gen.1:1", "Gen.1:1"),
        VersePair("Gen 1:2", "Gen.1:2", "Gen.1:2"),
        VersePair("3John 1:1", "3John.1:1", "3John.1:1"),
    ]
    assert [pair.chapter for pair in align(verses, verses)] == ["Gen 1", "Gen 1", "3John 1"]


def test_moved_verses_come_back():
    english = texts(("Jonah.1", 17), ("Jonah.2", 10))
    spanish = texts(("Jonah.1", 16), ("Jonah.2", 10))
    pairs = {pair.reference: pair[1:] for pair in align(english, spanish)}
    assert pairs["Jonah 1:16"] == ("Jonah.1:16", "Jonah.1:16")
    assert pairs["Jonah 1:17"] == ("Jonah.1:17", "Jonah.2:1")
    assert pairs["Jonah 2:1"] == ("Jonah.2:1", "Jonah.2:2")
    assert pairs["Jonah 2:8"] == ("Jonah.2:8", "Jonah.2:9")
    assert pairs["Jonah 2:9-10"] == ("Jonah.2:9 Jonah.2:10", "Jonah.2:10")
    assert len(pairs) == 17 + 9 and list(pairs)[15:18] == ["Jonah 1:16", "Jonah 1:17", "Jonah 2:1"]


def test_one_verse_may_be_two_in_spanish():
    verses = texts(("Judg.14", 20))
    pairs = align(verses, verses)
    assert pairs[17] == VersePair("Judg 14:18", "Judg.14:18", "Judg.14:18 Judg.14:19")
    assert pairs[18] == VersePair("Judg 14:19-20", "Judg.14:19 Judg.14:20", "Judg.14:20") and len(pairs) == 19


def test_a_verse_without_its_pair_is_named():
    verses = texts(("Gen.1", 3))
    with pytest.raises(ValueError, match=r"Gen 1:2 would be a pair of 'Gen.1:2' and ''"):
        align(verses, verses | {("Gen.1", 2): ""})
    with pytest.raises(ValueError, match=r"these Spanish verses are in no pair: Gen 1:4, Gen 1:5"):
        align(verses, texts(("Gen.1", 5)))
    jonah = texts(("Jonah.1", 17), ("Jonah.2", 10))
    with pytest.raises(ValueError, match=r"these Spanish verses are in no pair: Jonah 1:17"):
        align(jonah, jonah)


def test_a_verse_in_two_pairs_is_named(monkeypatch):
    verses = texts(("Gen.1", 3))
    monkeypatch.setattr(builder, "MOVED", (("Gen.1:1", "Gen.1:1-2"),))
    with pytest.raises(ValueError, match=r"Gen 1:2 would be in two pairs, the second for Gen 1:2"):
        align(verses, verses)


def test_the_table_names_each_verse_once():
    for side in (0, 1):
        places = [place for row in builder.MOVED for place in builder._places(row[side])]
        places += builder._places(*builder.LEFT_OUT[side])
        assert len(set(places)) == len(places) > 150


# The file -------------------------------------------------------------------------------------------------------------


def test_packing_keeps_everything_and_is_the_same_every_time():
    pairs = [VersePair("Gen 1:1", "it's\u2028so", "ñ ¿á?"), VersePair("Ps 1:2-3", "b", "c")]
    assert unpack(builder.pack(pairs)) == pairs
    assert builder.pack(pairs) == builder.pack(list(pairs))
    with pytest.raises(ValueError, match="Gen 1:1 has a tab or a line break in it"):
        builder.pack([VersePair("Gen 1:1", "a\tb", "c")])


def test_the_packages_become_the_file(tmp_path, monkeypatch):
    added = '<transChange type="added">y</transChange>'
    write_module(tmp_path / "sword-text-kjv" / "m", "ot", {"Gen": [["In\u2019s<note>n</note> it.", "And."], ["Thus."]]})
    write_module(tmp_path / "sword-text-sparv" / "m", "ot", {"Gen": [["EN ello.", f"Y{added}más."], ["ASÍ."]]})
    clients = tmp_path / "clients"
    clients.mkdir()
    for name, script in {
        "apt-get": 'touch "$3"_1_all.deb',
        "dpkg-deb": f'name=$(basename "$2" _1_all.deb); cp -r {tmp_path}/$name/. "$3"',
    }.items():
        (clients / name).write_text(f"#!/bin/sh\n{script}\n")
        (clients / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(clients), prepend=os.pathsep)
    out = tmp_path / "new" / "verses.tsv.xz"
    expected = [
        VersePair("Gen 1:1", "In's it.", "En ello."),
        VersePair("Gen 1:2", "And.", "Y y más."),
        VersePair("Gen 2:1", "Thus.", "Así."),
    ]
    assert builder.fetch(out) == unpack(out.read_bytes()) == expected
    assert [path.name for path in out.parent.iterdir()] == ["verses.tsv.xz"]

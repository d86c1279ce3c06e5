"""Make the golden of a SentencePiece tokenizer: a small `spiece.model`, and how sentencepiece itself reads with it.

    PYTHONPATH=.parity python tests/goldens/make_spiece_golden.py

`expected.json` has texts with their ids, `</s>` included, and what these are decoded to.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import sentencepiece

FOLDER = Path(__file__).parent / "spiece"
CORPUS = """Twenty-one is one and twenty, and two hundred and twenty-two is two and twenty after two hundred.
The house stands on the hill, and the sun stands over the house; the dog sleeps under the tree behind the house.
Where does the river go? It goes to the sea, they said, and nobody who went with it came back to the hill."""
RULES = {"\t": " ", "ﬁ": "fi", "½": "1/2", "…": "...", "Ä": "A"}  # a normaliser's table of a few bytes
TEXTS = (
    "The dog goes to the sea.",
    "  Two   spaces, and\ttabs ",
    "the ﬁsh, ½ a house … Ä",
    "unseen: 数 🤖 xyzzy",
    "twenty-twenty-one",
    "",
)


def main() -> None:
    """Train, and write both files."""
    FOLDER.mkdir(exist_ok=True)
    trained = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "rules.tsv"
        rows = [[" ".join(f"{ord(char):X}" for char in part) for part in rule] for rule in RULES.items()]
        table.write_text("".join("\t".join(row) + "\n" for row in rows))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS.splitlines()),
            model_writer=trained,
            vocab_size=60,
            normalization_rule_tsv=str(table),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    (FOLDER / "spiece.model").write_bytes(trained.getvalue())
    reader = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    ids = [[*reader.encode(text), reader.eos_id()] for text in TEXTS]
    expected = [{"text": text, "ids": row, "decoded": reader.decode(row)} for text, row in zip(TEXTS, ids, strict=True)]
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(len(trained.getvalue()), "bytes;", expected[2])


if __name__ == "__main__":
    main()

"""The tokenizer of a `spiece.model`, a SentencePiece unigram model, as a Hugging Face one.

transformers converts such a file too, but only where the package sentencepiece is installed, of which it uses nothing.
The file is a protocol buffer (layout: sentencepiece's src/sentencepiece_model.proto); three of its parts are needed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxrl_llm import runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # kinds of pieces
UNIGRAM = 1  # kind of model
ROLES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
EXTRA_IDS = 100  # sentinels, counted down at the end of the vocabulary, where tokenizer_config.json gives no number
HIDDEN = "\u2028unused\u2028"  # before a piece that no text is cut into: words hold no white space, so it never matches


def load(folder: Path) -> PreTrainedTokenizerFast:
    """The T5 tokenizer of the folder's `spiece.model`: `</s>` behind each text, sentinels behind the vocabulary.

    Raises:
        ValueError: if the file is damaged, or no unigram model, or the folder's `tokenizer_config.json` is not what it
            must be.
    """
    runtime.quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    pieces, kinds, unknown, charsmap = read(folder / "spiece.model")
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(_extra_ids(folder / "tokenizer_config.json")))]
    known = {piece for piece, _ in pieces}
    special = [piece for (piece, _), kind in zip(pieces, kinds, strict=True) if kind in (UNKNOWN, CONTROL)]
    own = [piece for (piece, _), kind in zip(pieces, kinds, strict=True) if kind == USER_DEFINED]
    # As sentencepiece does, an unused piece keeps its id and its text, but no text is cut into it.
    hidden = [kind == UNUSED and piece not in sentinels for (piece, _), kind in zip(pieces, kinds, strict=True)]
    pieces = [(HIDDEN + each[0], 0.0) if hide else each for each, hide in zip(pieces, hidden, strict=True)]
    backend = _backend([*pieces, *((each, 0.0) for each in sentinels if each not in known)], unknown, charsmap)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, *sentinels)])
    backend.add_tokens([AddedToken(token, normalized=False) for token in own])
    roles = {role: token for role, token in ROLES.items() if backend.token_to_id(token) is not None}
    if "eos_token" in roles:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=sentinels, clean_up_tokenization_spaces=False, **roles
    )


def _backend(vocabulary: list[tuple[str, float]], unknown: int, charsmap: bytes) -> Tokenizer:
    """Words are cut at white space and begin with ▁; the pieces are the most probable ones."""
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=False))
    if charsmap:
        backend.normalizer = normalizers.Precompiled(charsmap)
    spaces = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    backend.decoder = decoders.Sequence([decoders.Replace(HIDDEN, ""), decoders.Metaspace(**spaces)])
    return backend


def _extra_ids(path: Path) -> int:
    """How many sentinels the `tokenizer_config.json` at this path says."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(settings).__name__}.")
    count = settings.get("extra_ids")
    count = EXTRA_IDS if count is None else count
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{path}: extra_ids must be a whole number from 0 on, but is {count!r}.")
    return count


def read(path: Path) -> tuple[list[tuple[str, float]], list[int], int, bytes]:
    """Pieces with their log-probabilities, the kind of each, the unknown piece's id, and the normaliser's table.

    Raises:
        ValueError: if the file is damaged, or no unigram model.
    """
    pieces, kinds, model_kind, unknown, charsmap = [], [], UNIGRAM, 0, b""
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = {1: b"", 2: b"\0\0\0\0", 3: 1} | dict(_fields(value))
                pieces.append((piece[1].decode(), *struct.unpack("<f", piece[2])))
                kinds.append(piece[3])
            elif field == 2:
                trainer = dict(_fields(value))
                model_kind, unknown = trainer.get(3, UNIGRAM), trainer.get(40, 0)
            elif field == 3:
                charsmap = dict(_fields(value)).get(2, b"")
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no SentencePiece model.") from error
    if not pieces or unknown >= len(pieces):
        raise ValueError(f"{path} is damaged, or no SentencePiece model.")
    if model_kind != UNIGRAM:
        raise ValueError(f"{path} must hold a unigram model (kind {UNIGRAM}), but its kind is {model_kind}.")
    return pieces, kinds, unknown, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer's message: number, and value (an integer, or bytes)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    def take(count: int) -> bytes:
        nonlocal at
        if at + count > len(data):
            raise ValueError("cut short")
        at += count
        return data[at - count : at]

    while at < len(data):
        field, wire = divmod(varint(), 8)
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"no wire type: {wire}")
        yield field, varint() if wire == 0 else take({1: 8, 5: 4}[wire] if wire != 2 else varint())

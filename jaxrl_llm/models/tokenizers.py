"""Hugging Face tokenizers from other formats: GGUF metadata, and T5's `spiece.model`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxrl_llm import runtime

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces, in both formats

# GGUF: byte-level or SentencePiece BPE --------------------------------------------------------------------------------

LISTS = {"tokens": str, "token_type": int, "scores": float, "merges": str}
NAMED_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}

# Splits of text before merging: the matches of each expression in turn, and the text between them, become pieces. Names
# are llama.cpp's (src/llama-vocab.cpp), expressions those of the tokenizers with these names.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2, LLAMA3 = GPT4.replace("DIGITS", ""), GPT4.replace("DIGITS", "{1,3}")
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%sENDING|"
O200K = LETTERS % ("*", "+") + LETTERS % ("+", "*")
O200K += r"\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "default": (r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),  # llama.cpp's own
    **dict.fromkeys(("gpt-2", "gpt2"), (GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (LLAMA3,)),
    "tekken": (O200K.replace("ENDING", "").replace("DIGITS", ""),),
    "gpt-4o": (O200K.replace("ENDING", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}"),),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}"),
}
WHOLE_NAMES = ("llama-bpe", "llama3", "llama-v3", "tekken")  # keep a piece that is a token whole, and begin with BOS
NFC_NAMES = ("qwen2", "command-r")  # normalise Unicode in their Hugging Face form, as in training


def from_gguf(
    fields: dict[str, Any], name: str, *, added: Mapping[str, AddedToken] | None = None
) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of a GGUF file's `fields`; None if they have none. `name` is the file's, for messages.

    Args:
        added: tokens among those of the fields that have settings of their own, by their content.

    Raises:
        ValueError: if a field is missing or contradicts another, or the kind of tokenizer is unknown.
    """
    runtime.quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    kind = fields.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{name}: tokenizer.ggml.model must be gpt2 or llama, but is {kind!r}.")
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    for key, of in LISTS.items():
        value = fields.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, of) for each in value[:1]):  # lists hold one kind
            raise ValueError(f"{name}: tokenizer.ggml.{key} must be a list of {of.__name__}.")
    if not isinstance(template := fields.get("tokenizer.chat_template"), str | None):
        raise ValueError(f"{name}: tokenizer.chat_template must be a string, but is {template!r}.")
    tokens = _required(fields, "tokens", name)
    types = fields.get("token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(f"{name} must give each of its {len(tokens)} tokens a type, but gives {len(types)}.")
    named = _named_tokens(fields, tokens, name)
    if kind == "gpt2":
        backend, options = _byte_level(fields, tokens, name)
    else:
        backend, options = _sentencepiece(fields, tokens, types, named.get("unk"), name)
    vocab = {token: index for index, token in enumerate(tokens)}
    backend.model = models.BPE(vocab, [])
    backend.add_tokens(
        [
            (added or {}).get(token) or AddedToken(token, special=of_type != USER_DEFINED, normalized=False)
            for token, of_type in zip(tokens, types, strict=True)
            if of_type in (UNKNOWN, CONTROL, USER_DEFINED)
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        add_bos_token=_adds(fields, "bos", kind == "llama" or fields["pre"] in WHOLE_NAMES, named, name),
        add_eos_token=_adds(fields, "eos", False, named, name),
        **{f"{role}_token": token for role, token in named.items()},
    )
    tokenizer.backend_tokenizer.model = models.BPE(vocab, **options)  # now: copying its merges would take seconds
    return tokenizer


def _required(fields: dict[str, Any], key: str, name: str) -> Any:
    if key not in fields:
        raise ValueError(f"{name} has a tokenizer without tokenizer.ggml.{key}.")
    return fields[key]


def _named_tokens(fields: dict[str, Any], tokens: list[str], name: str) -> dict[str, str]:
    ids = {role: fields[key] for role, key in NAMED_TOKENS.items() if key in fields}
    for role, index in ids.items():
        if index not in range(len(tokens)):
            raise ValueError(f"{name}: the {role} token must be one of {len(tokens)}, but its id is {index}.")
    return {role: tokens[int(index)] for role, index in ids.items()}


def _adds(fields: dict[str, Any], role: str, default: bool, named: dict[str, str], name: str) -> bool:
    adds = fields.get(f"add_{role}_token", default and role in named)
    if adds and role not in named:
        raise ValueError(f"{name}: tokenizer.ggml.add_{role}_token is true, but there is no {role} token.")
    return bool(adds)


def _byte_level(fields: dict[str, Any], tokens: list[str], name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the parts of a tokenizer of GPT-2's kind (Radford et al. 2019): merges of bytes within pieces of a split.

    They are a tokenizer without a model, and the options of its model.
    """
    pre = _required(fields, "pre", name)
    if not isinstance(pre, str) or pre not in SPLITS:
        raise ValueError(f"{name}: tokenizer.ggml.pre must be one of {', '.join(SPLITS)}, but is {pre!r}.")
    merges = [tuple(merge.split(" ")) for merge in _required(fields, "merges", name)]
    known = set(tokens)
    if bad := [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= known]:
        raise ValueError(f"{name}: {len(bad)} merges are not of two tokens into a third, {bad[0]} among them.")
    backend = Tokenizer(models.BPE())
    if pre in NFC_NAMES:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, {"merges": merges, "ignore_merges": pre in WHOLE_NAMES}


def _sentencepiece(
    fields: dict[str, Any], tokens: list[str], types: list[int], unk: str | None, name: str
) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the parts of a tokenizer of Llama 2's kind (Kudo and Richardson 2018), as `_byte_level` does.

    It has ▁ for spaces, merges by score, and bytes for unknown characters.

    As in llama.cpp and Llama 2's tokenizer.json, text after a special token also gets a leading ▁.
    """
    scores = _required(fields, "scores", name)
    if len(scores) != len(tokens):
        raise ValueError(f"{name} must give each of its {len(tokens)} tokens a score, but gives {len(scores)}.")
    backend = Tokenizer(models.BPE())
    prefix = bool(fields.get("add_space_prefix", True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    options = {"unk_token": unk, "fuse_unk": True, "byte_fallback": True}
    return backend, {"merges": _merges(tokens, types, scores)} | options


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Return every merge of two tokens into a third, best token first.

    Equal scores are ordered by id: some converters write one score for all tokens, and ids keep the merge order.
    """
    whole = (UNKNOWN, CONTROL, USER_DEFINED, BYTE)  # not results or parts of merges
    ids = {token: index for index, token in enumerate(tokens) if types[index] not in whole}
    order = sorted(ids.values(), key=lambda index: (-scores[index], index))
    return [
        (left, right)
        for token in map(tokens.__getitem__, order)
        for cut in range(len(token) - 1, 0, -1)
        if (left := token[:cut]) in ids and (right := token[cut:]) in ids
    ]


# spiece.model: a SentencePiece unigram model --------------------------------------------------------------------------
#
# transformers converts such a file too, but only where the package sentencepiece is installed, which it does not use.
# The file is a protocol buffer (layout: sentencepiece's src/sentencepiece_model.proto); three of its parts are needed.
# transformers 5.23 also ignores byte fallback, which mT5 and umT5 have.

UNIGRAM, BPE = 1, 2  # kinds of models
BPE_ROLES = {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"}
ROLES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
EXTRA_IDS = 100  # sentinels after the vocabulary, in descending order, if none are in it and no file gives a number
HIDDEN = "\u2028unused\u2028"  # prefix of unused pieces: words contain no white space, so that it never matches


class Spiece(NamedTuple):
    """The parts of a `spiece.model` that are needed."""

    pieces: list[tuple[str, float]]  # with their log-probabilities
    kinds: list[int]
    unknown: int  # index of the unknown piece
    charsmap: bytes = b""  # the normaliser's table
    prefix: bool = True  # text begins with ▁
    collapse: bool = True  # runs of spaces are one
    byte_fallback: bool = False  # an unknown character becomes the pieces of its bytes in UTF-8


def from_spiece(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the `spiece.model` of T5 or its kin: `</s>` after each text, sentinels after the pieces.

    mT5's sentinels are pieces themselves.

    Raises:
        ValueError: if the file is damaged or not a unigram model, or the folder's `tokenizer_config.json` is malformed.
    """
    runtime.quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    model = read_spiece(folder / "spiece.model")
    known = {piece for piece, _ in model.pieces}
    default = 0 if {"<extra_id_0>", "▁<extra_id_0>"} & known else EXTRA_IDS
    count = _extra_ids(folder / "tokenizer_config.json", default)
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(count))]
    special = [piece for (piece, _), kind in zip(model.pieces, model.kinds, strict=True) if kind in (UNKNOWN, CONTROL)]
    # As in sentencepiece, an unused piece keeps its id and its text, but never results from tokenisation. A piece that
    # a user defined always does: its log-probability is 0.
    hidden = [
        kind == UNUSED and piece not in sentinels for (piece, _), kind in zip(model.pieces, model.kinds, strict=True)
    ]
    pieces = [(HIDDEN + each[0], 0.0) if hide else each for each, hide in zip(model.pieces, hidden, strict=True)]
    further = [(each, 0.0) for each in sentinels if each not in known]
    backend = _backend(model._replace(pieces=pieces + further))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, *sentinels)])
    size = backend.get_vocab_size()
    added = _added_tokens(folder, _settings_of(folder), size=size)
    backend.add_tokens([token for number, token in added.items() if number >= size])
    roles = {role: token for role, token in ROLES.items() if backend.token_to_id(token) is not None}
    if "eos_token" in roles:
        backend.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=sentinels, clean_up_tokenization_spaces=False, **roles
    )


def _backend(model: Spiece) -> Tokenizer:
    """Return the unigram tokenizer: words begin with ▁, and are read one by one unless their spaces matter."""
    backend = Tokenizer(models.Unigram(model.pieces, unk_id=model.unknown, byte_fallback=model.byte_fallback))
    normal = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    to_text = [decoders.Replace(HIDDEN, ""), *[decoders.ByteFallback()] * model.byte_fallback]
    # A text such as "<0x41>" is not the piece of that byte.
    splits = [pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous")] * model.byte_fallback
    if model.prefix and model.collapse:
        spaces = {"replacement": "▁", "prepend_scheme": "always", "split": True}
        splits = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces), *splits]
        to_text += [decoders.Metaspace(**spaces)]
    else:
        normal += _spaces(model)
        to_text += [decoders.Replace("▁", " "), decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * model.prefix]
    backend.normalizer = normalizers.Sequence(normal)
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.Sequence(to_text)
    return backend


def _spaces(model: Spiece) -> list[normalizers.Normalizer]:
    """Return what a text's spaces become: runs of them one, if the model says so, and each ▁."""
    collapsed = [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")] * model.collapse
    return [*collapsed, *[normalizers.Prepend("▁")] * model.prefix, normalizers.Replace(" ", "▁")]


def _settings(path: Path) -> dict[str, Any]:
    """Return the fields of a `tokenizer_config.json`; none if there is no such file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(settings).__name__}.")
    return settings


def _extra_ids(path: Path, default: int) -> int:
    """Return the number of sentinels of the `tokenizer_config.json` at this path."""
    settings = _settings(path)
    listed = settings.get("additional_special_tokens")
    listed = [token for token in (listed if isinstance(listed, list) else []) if "<extra_id_" in str(token)]
    count = settings.get("extra_ids")
    count = (len(listed) or default) if count is None else count
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{path}: extra_ids must be a whole number from 0 on, but is {count!r}.")
    return count


def from_sentencepiece_bpe(folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a `tokenizer.model` alone, as Llama 2's and Mistral's first folders have it.

    Its chat template, its added tokens, the roles of tokens, and whether it adds BOS and EOS are those of the files
    beside it, if there are any: `tokenizer_config.json`, `added_tokens.json`, `chat_template.jinja`.

    Raises:
        ValueError: if the file is damaged or not a SentencePiece model of merges, or does not fit those beside it.
    """
    path = folder / "tokenizer.model"
    model = read_spiece(path, kind=BPE)
    settings = _settings_of(folder)
    tokens, kinds = [piece for piece, _ in model.pieces], list(model.kinds)
    added = _added_tokens(folder, settings, size=len(tokens))
    for index, token in added.items():
        tokens[index : index + 1] = [token.content]
        kinds[index : index + 1] = [CONTROL if token.special else USER_DEFINED]
    roles = BPE_ROLES | {
        role: content
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad"))
        if (content := _content(settings.get(f"{name}_token")))
    }
    fields = {
        "model": "llama",
        "tokens": tokens,
        "token_type": kinds,
        "scores": [score for _, score in model.pieces] + [0.0] * (len(tokens) - len(model.pieces)),
        "add_space_prefix": model.prefix,
        **{name: settings[name] for name in ("add_bos_token", "add_eos_token") if name in settings},
        **{f"{name}_token_id": tokens.index(token) for name, token in roles.items() if token in tokens},
    }
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    tokenizer = from_gguf(fields, str(path), added={token.content: token for token in added.values()})
    normal = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(normal + _spaces(model))
    tokenizer.chat_template = _chat_template(folder, settings)
    return tokenizer


def _content(token: Any) -> Any:
    """Return the text of a token that is written as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's tokenizer."""
    return _settings(folder / "special_tokens_map.json") | _settings(folder / "tokenizer_config.json")


def _added_tokens(folder: Path, settings: dict[str, Any], *, size: int) -> dict[int, AddedToken]:
    """Return the tokens that a folder adds to a vocabulary of this size, or has in it, in the order of their ids.

    Raises:
        ValueError: if they are malformed, or the new ones are not numbered from `size` on.
    """
    special = {_content(value) for name, value in settings.items() if name.endswith("_token")}
    special |= {_content(each) for each in settings.get("additional_special_tokens") or ()}
    found = {
        number: {"content": token, "special": token in special}
        for token, number in _settings(folder / "added_tokens.json").items()
    }
    flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
    try:
        found |= {int(number): token for number, token in (settings.get("added_tokens_decoder") or {}).items()}
        added = {
            number: AddedToken(token["content"], **{"normalized": False} | {k: token[k] for k in flags if k in token})
            for number, token in sorted(found.items())
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder} must map ids to added tokens, but they are malformed: {error!r}.") from error
    for place, number in enumerate((number for number in added if not 0 <= number < size), size):
        if number != place:
            token = added[number].content
            raise ValueError(f"{folder} must give the added token {token!r} the id {place}, but it has {number}.")
    return added


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    """Return a folder's chat template: a file of its own, or that of its settings; of several, each by its name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}
    return template


def read_spiece(path: Path, *, kind: int = UNIGRAM) -> Spiece:
    """Return the parts of a `spiece.model` or `tokenizer.model`.

    Raises:
        ValueError: if the file is damaged or of another kind.
    """
    pieces, kinds, trainer, normaliser = [], [], {}, {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = {1: b"", 2: b"\0\0\0\0", 3: 1} | dict(_fields(value))
                pieces.append((piece[1].decode(), *struct.unpack("<f", piece[2])))
                kinds.append(piece[3])
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normaliser = dict(_fields(value))
        unknown, charsmap = int(trainer.get(40, 0)), bytes(normaliser.get(2, b""))
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no SentencePiece model.") from error
    if not pieces or unknown >= len(pieces):
        raise ValueError(f"{path} is damaged, or no SentencePiece model.")
    if (found := trainer.get(3, UNIGRAM)) != kind:
        name = {UNIGRAM: "unigram model", BPE: "model of merges"}[kind]
        raise ValueError(f"{path} must hold a {name} (kind {kind}), but its kind is {found}.")
    if trainer.get(24):
        raise ValueError(f"{path} must put ▁ before words, but puts it behind them.")
    prefix, collapse = (bool(normaliser.get(field, True)) for field in (3, 4))
    return Spiece(pieces, kinds, unknown, charsmap, prefix, collapse, byte_fallback=bool(trainer.get(35)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer's message: number, and value (an integer or bytes)."""
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

"""The word-level tokenizer of number names: one vocabulary for both languages, one token for each word.

A token is a word, so that indices of the gold alignment are indices of tokens. Hyphens are not tokens, for they follow
from the words; decoding restores them.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxrl_llm import runtime
from jaxrl_llm.data import number_names

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # 0, 1, 2, as in T5; its decoder starts from pad
PAD_ID, EOS_ID, UNK_ID = range(3)


def build() -> Tokenizer:
    """Return the tokenizer; it ignores case and Unicode form, and appends `</s>`.

    `decode(encode(text).ids)` restores every English and German name as `number_names` writes it.
    """
    words = dict.fromkeys((PAD, EOS, UNK, *number_names.ENGLISH_WORDS, *number_names.GERMAN_WORDS))
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token=UNK))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS, UNK)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s-]+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, EOS_ID)])
    tokenizer.decoder = _decoder()
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, as transformers loads them, also for a T5."""
    runtime.quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special).save_pretrained(
        folder
    )


def _decoder() -> decoders.Decoder:
    """Return the decoder: words joined by spaces, some of which become hyphens."""
    units = "|".join(number_names.ENGLISH_WORDS[1:10])
    german = "|".join(number_names.GERMAN_WORDS)
    return decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),  # no word has this prefix: it only inserts spaces
            decoders.Fuse(),
            decoders.Replace(Regex(rf"(?<=ty) (?=(?:{units})\b)"), "-"),
            decoders.Replace(Regex(rf" (?=(?:{german})\b)"), "-"),
        ]
    )

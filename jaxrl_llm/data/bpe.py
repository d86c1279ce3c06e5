"""Byte-level BPE tokenizers of GPT-2's kind: training, saving, and encoding documents as one stream."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxrl_llm import runtime

END_OF_TEXT = "<|endoftext|>"


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` entries; entry 0 is `<|endoftext|>`. It can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Encode all texts as one array of tokens, with `<|endoftext|>` before each and at the end."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [token for encoding in tokenizer.encode_batch(texts) for token in (end, *encoding.ids)]
    return np.asarray([*pieces, end], np.uint16 if tokenizer.get_vocab_size() < 2**16 else np.int32)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, as transformers loads them."""
    runtime.quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)

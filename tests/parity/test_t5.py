"""T5, mT5 and umT5 against transformers + torch, live, over random configurations; run by `make parity`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.decoding import beam_search, generate

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def theirs():
    """torch is imported here, so that collecting the tests does not need it."""
    from tests.parity import reference, t5_reference

    return reference, t5_reference


@functools.partial(jax.jit, static_argnums=0)
def logits_and_maps(t5, params, source, mask, target):
    lm, given = t5.start(params, source, mask)
    return lm.apply(given, target)[0], t5.attention(params, source, target, source_mask=mask)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_logits_attention_greedy_and_beams_agree(theirs, family, seed, tmp_path):
    reference, t5_reference = theirs
    rng = np.random.default_rng([seed, 13])
    config = t5_reference.random_config(rng, family)
    tied = config.scale_decoder_outputs if family == "t5" else seed % 3 == 0
    model = t5_reference.random_model(config, seed, tied=tied)
    reference.save(model, tmp_path)
    source, mask = t5_reference.random_sources(rng, config.vocab_size)
    target = rng.integers(0, config.vocab_size, (4, 14))
    expected = t5_reference.compute(model, source, mask, target)
    loaded = models.load(tmp_path)
    t5, params = loaded.model, loaded.params
    assert (t5.config.model_type, t5.config.tie_word_embeddings) == (family, tied)

    logits, maps = logits_and_maps(t5, params, source, mask, target)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)
    for name, queries in (("encoder", mask), ("decoder", None), ("cross", None)):
        weights = expected[name] if queries is None else np.where(queries[None, :, None, :, None], expected[name], 0)
        np.testing.assert_allclose(getattr(maps, name), weights, rtol=0, atol=1e-4)

    lm, given = t5.start(params, source, mask)
    options = {"max_new_tokens": t5_reference.NEW_TOKENS, "eos_id": t5_reference.EOS, "pad_id": t5_reference.PAD}
    greedy = generate(lm, given, t5.decoder_prompts(4), greedy=True, **options)
    np.testing.assert_array_equal(greedy.tokens, expected["generated"])
    for index, penalty in enumerate(t5_reference.PENALTIES):
        options |= {"num_beams": t5_reference.BEAMS, "length_penalty": penalty}
        beams = beam_search(lm, given, t5.decoder_prompts(4), **options)
        np.testing.assert_array_equal(beams.tokens, expected["beams"][index])
        np.testing.assert_allclose(beams.score, expected["scores"][index], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "stablelm"])
def test_attention_weights_of_decoders_agree(theirs, family, tmp_path):
    import torch

    reference, _ = theirs
    for seed in range(4):
        rng = np.random.default_rng([seed, 17])
        config = reference.random_config(rng, family)
        config._attn_implementation = "eager"
        model = reference.random_model(config, seed)
        reference.save(model, tmp_path)
        loaded = models.load(tmp_path)
        tokens, mask = reference.random_prompts(rng, config.vocab_size)
        attention = torch.tensor(mask).long()
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            out = model(torch.tensor(tokens), attention_mask=attention, position_ids=positions, output_attentions=True)
        expected = np.where(mask[None, :, None, :, None], np.stack([each.numpy() for each in out.attentions]), 0)
        found = jax.jit(loaded.model.attention)(loaded.params, tokens, mask=mask)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "tied", "scaled"),
    [
        *(("t5", tied, scaled) for tied, scaled in ((True, None), (False, None), (True, False), (False, True))),
        *((family, tied, None) for family in ("mt5", "umt5") for tied in (True, False)),
    ],
)
def test_transformers_loads_what_we_save(theirs, family, tied, scaled, tmp_path):
    import torch
    import transformers

    from jaxrl_llm.models.t5 import T5, T5Config
    from tests.conftest import random_params

    sizes = {"vocab_size": 31, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3}
    kind = {"model_type": family, "tie_word_embeddings": tied, "scale_decoder_outputs": scaled}
    t5 = T5(T5Config(**sizes, **kind, feed_forward_proj="gated-silu"))
    params = random_params(t5)
    models.save(tmp_path, t5, params, config={"eos_token_id": 1, "pad_token_id": 0})
    model, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is theirs[1].FAMILIES[family][1]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if family == "umt5":
        model.config.tie_word_embeddings = tied  # transformers 5 takes every umT5 for tied, and scales its outputs
    source, target = np.asarray([[5, 3, 9, 4], [2, 2, 8, 1]]), np.asarray([[0, 7, 30], [0, 1, 1]])
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(source), decoder_input_ids=torch.tensor(target)).logits
    lm, given = t5.start(params, source)
    np.testing.assert_allclose(lm.apply(given, jnp.asarray(target))[0], theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bytes_", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("collapse", [True, False])
def test_spiece_model_reads_as_sentencepiece_does(theirs, bytes_, prefix, collapse, tmp_path):
    """The tokens of random texts, with sentinels among the pieces as mT5 has them, are SentencePiece's."""
    import io

    import sentencepiece

    from jaxrl_llm.models import tokenizers

    corpus = "The house stands on the hill, and the sun stands over the house.\nWhere does <0x41 go? 0 1 2 3 4 5 A B C"
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()), model_writer=trained, vocab_size=50 + 256 * bytes_,
        byte_fallback=bytes_, add_dummy_prefix=prefix, remove_extra_whitespaces=collapse, hard_vocab_limit=False,
        user_defined_symbols=["▁<extra_id_0>"], pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(trained.getvalue())
    reader = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    tokenizer = tokenizers.from_spiece(tmp_path)
    assert len(tokenizer) == reader.get_piece_size()
    words = ["the", "house.", "<0x41>", "A", "<0x4", "数", "🤖", "é", " ", "  ", "\t", "<extra_id_0>", "Ä", "½"]
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(f"{rng.choice(words)}{' ' * rng.integers(3)}" for _ in range(rng.integers(1, 7)))
        ids = reader.encode(text)
        assert tokenizer(text).input_ids == [*ids, 1], text
        if reader.unk_id() not in ids:
            assert tokenizer.decode(ids) == reader.decode(ids), text

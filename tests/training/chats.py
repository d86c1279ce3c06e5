"""Small tokenizers with chat templates of the forms of Llama 2, Llama 3, Qwen 2 and 3, Gemma and DeepSeek R1."""

import copy
import functools

import tokenizers
import transformers

from jaxrl_llm import models

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\n' + "
    "messages[0]['content'] + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (first if loop.index0 == 0 else '') + m['content'] | trim "
    "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN2 = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}{% for call in m.tool_calls %}{{ '\n<tool_call>\n' + "
    "(call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # the last turn has its thoughts, or an empty place for them; turns before the user's last have none
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
R1 = (  # decoding is given the beginning of the thoughts, which a finished turn does not keep
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
TOOLS = (  # in few tokens
    "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
NEWLINE = (  # ends a turn with EOS and a new line
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@functools.cache
def byte_level(template, *control, bos=None, eos="<|endoftext|>"):
    """tiny-gpt2's tokenizer with a template and its control tokens."""
    found = copy.deepcopy(models.load("tiny-gpt2").tokenizer)
    found.add_special_tokens({"additional_special_tokens": [each for each in (*control, bos, eos) if each]})
    found.bos_token, found.eos_token, found.chat_template = bos, eos, template
    return found


@functools.cache
def llama2(template=LLAMA2):
    """Of Llama 2's form: SentencePiece with ▁ put before a text, and before what follows a control token."""
    words = ["▁The", "▁king", "▁was", "▁good", "▁[INST]", "▁[/INST]"]
    letters = sorted({*"▁[]/<>|abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:'0123456789_"})
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            pair = word[: end - 1], word[end - 1]
            if pair not in merges:
                merges.append(pair)
                vocab.append(word[:end])
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {token: place for place, token in enumerate(vocab)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


HEADER, IM, TURN = ("<|start_header_id|>", "<|end_header_id|>"), ("<|im_start|>",), ("<start_of_turn>", "<end_of_turn>")
FORMS = {
    "llama2": llama2,
    "llama3": lambda: byte_level(LLAMA3, *HEADER, bos="<|begin_of_text|>", eos="<|eot_id|>"),
    "qwen2": lambda: byte_level(QWEN2, *IM, eos="<|im_end|>"),
    "qwen3": lambda: byte_level(QWEN3, *IM, eos="<|im_end|>"),
    "gemma": lambda: byte_level(GEMMA, *TURN, bos="<bos>", eos="<eos>"),
    "r1": lambda: byte_level(R1, "<|User|>", "<|Assistant|>", bos="<|begin|>", eos="<|end|>"),
    "newline": lambda: byte_level(NEWLINE, bos="<|endoftext|>"),
}


def ends(tokenizer):
    """The ids that end a completion: EOS, and Gemma's end of a turn."""
    return [tokenizer.convert_tokens_to_ids("<end_of_turn>")] if "<end_of_turn>" in tokenizer.get_vocab() else []

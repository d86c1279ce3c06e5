"""From prompts and answers as text to rows of tokens that fit the context; what is cut is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from jaxrl_llm import text
from jaxrl_llm.data.records import Text, alike

Cut = Literal["left", "right", "raise"]


class Encoded(NamedTuple):
    """A prompt's tokens and those of each answer to it."""

    prompt: list[int]
    answers: list[list[int]]


class Encoder:
    """Encodes prompts with their answers, EOS behind each answer, in at most `max_length` tokens.

    An answer that is a string is encoded by itself: no token spans the boundary to its prompt, in training as in
    decoding. Conversations go through the chat template; an answer is what it adds to the prompt. Where one of prompt
    and answers is a conversation, all are: see `records.alike`.

    Args:
        tokenizer: of Hugging Face's kind.
        max_length: of prompt and answer together.
        cut: what over-long rows lose: "left", the beginning of the prompt, but not its BOS token; "right", the end of
            the answer, and EOS with it; "raise" refuses them.

    `cut_prompts` and `cut_answers` count what was cut.

    Raises:
        ValueError: if `cut` is another one, or the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, cut: Cut = "left"):
        if cut not in get_args(Cut):
            raise ValueError(f"cut must be one of {', '.join(get_args(Cut))}, but is {cut!r}.")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, by which answers would end.")
        self._tokenizer, self.max_length, self._cut = tokenizer, max_length, cut
        self.cut_prompts = self.cut_answers = 0

    def prompt(self, asked: Text, *, room: int) -> list[int]:
        """A prompt's tokens, which leave `room` tokens for an answer.

        Raises:
            ValueError: if it is too long and not to be cut on the left.
        """
        tokens = self._prompt(asked)
        most = self.max_length - room
        if len(tokens) <= most:
            return tokens
        if self._cut != "left" or not self._can_be_cut(tokens, most):
            raise ValueError(f"a prompt of {len(tokens)} tokens leaves no room for {room} more in {self.max_length}.")
        return self._end_of(tokens, most)

    def __call__(self, asked: Text, answers: Sequence[Text]) -> Encoded:
        """A prompt with its answers. All of them follow the same tokens of the prompt.

        Raises:
            ValueError: for a row that does not fit and is not to be cut there, or a chat template that changes the
                prompt when the answer follows.
        """
        asked, answers = alike(asked, answers)
        prompt, found = self._prompt(asked), [self._answer(asked, answer) for answer in answers]
        longest = max(map(len, found))
        if len(prompt) + longest <= self.max_length:
            return Encoded(prompt, found)
        if self._cut == "raise":
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and an answer of {longest} are longer than {self.max_length}."
            )
        if self._cut == "left":
            most = self.max_length - longest
            if not self._can_be_cut(prompt, most):
                raise ValueError(f"an answer of {longest} tokens leaves no token for its prompt in {self.max_length}.")
            return Encoded(self._end_of(prompt, most), found)
        room = self.max_length - len(prompt)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room for an answer in {self.max_length}.")
        self.cut_answers += sum(len(answer) > room for answer in found)
        return Encoded(prompt, [answer[:room] for answer in found])

    def _can_be_cut(self, prompt: list[int], most: int) -> bool:
        return most > self._begins(prompt)

    def _end_of(self, prompt: list[int], most: int) -> list[int]:
        """The end of a prompt behind the BOS token that it began with: models rest much of their attention on it."""
        self.cut_prompts += 1
        begins = self._begins(prompt)
        return [*prompt[:begins], *prompt[len(prompt) - most + begins :]]

    def _begins(self, prompt: list[int]) -> int:
        return int(prompt[:1] == [self._tokenizer.bos_token_id])

    def _prompt(self, asked: Text) -> list[int]:
        if isinstance(asked, str):
            return text.encode(self._tokenizer, asked)
        return self._plain(self._rendered(asked, generation=True))

    def _answer(self, asked: Text, answer: Text) -> list[int]:
        eos = self._tokenizer.eos_token_id
        if isinstance(answer, str):
            tokens = self._plain(answer)
        else:
            before, whole = self._rendered(asked, generation=True), self._rendered((*asked, *answer), generation=False)
            if not whole.startswith(before):
                raise ValueError("the chat template writes the prompt otherwise when an answer follows it.")
            tokens = self._plain(whole.removeprefix(before).rstrip())
        return tokens if tokens and tokens[-1] == eos else [*tokens, eos]

    def _plain(self, string: str) -> list[int]:
        return self._tokenizer(string, add_special_tokens=False)["input_ids"]

    def _rendered(self, messages: Sequence[dict[str, str]], *, generation: bool) -> str:
        if not self._tokenizer.chat_template:
            raise ValueError("the data hold conversations, but the tokenizer has no chat template.")
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)

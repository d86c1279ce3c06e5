"""What a line of a training file may be: prompts, demonstrations, preferences, judged and ranked answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, str]  # {"role": ..., "content": ...}
Text = str | tuple[Message, ...]  # a string, or the messages of a conversation
Fields = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Something to answer; `fields` are the line's other entries, for a reward function to use."""

    prompt: Text
    fields: Fields = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """An answer to imitate. Plain text has the prompt ""."""

    prompt: Text
    answer: Text


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers, of which the first is preferred."""

    prompt: Text
    chosen: Text
    rejected: Text

    def ranked(self) -> Ranked:
        """As a ranking of two."""
        return Ranked(self.prompt, (self.chosen, self.rejected), (0, 1))


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer that is good or bad."""

    prompt: Text
    answer: Text
    good: bool


@dataclasses.dataclass(frozen=True)
class Ranked:
    """K answers with their ranks: 0 is best, equal ranks are ties."""

    prompt: Text
    answers: tuple[Text, ...]
    ranks: tuple[int, ...]


def prompt(line: Fields) -> Prompt:
    """{"prompt": ...}, with any further entries."""
    return Prompt(_text(line, "prompt"), {name: value for name, value in line.items() if name != "prompt"})


def demonstration(line: Fields) -> Demonstration:
    """{"prompt", "answer"} or "completion" for it; {"messages"} that end in the assistant's; or {"text"}."""
    if "messages" in line:
        messages = _text(line, "messages")
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise ValueError("messages must end with one of the assistant, to be imitated")
        if len(messages) < 2:
            raise ValueError("messages must hold one before the assistant's last, to be answered")
        return Demonstration(messages[:-1], messages[-1:])
    if "text" in line:
        if not isinstance(line["text"], str):
            raise ValueError(f"text must be a string, but is {str(line['text'])[:60]!r}")
        return Demonstration("", _text(line, "text"))
    answer = _text(line, "completion" if "completion" in line else "answer")
    asked, (answer,) = alike(_text(line, "prompt"), (answer,))
    return Demonstration(asked, answer)


def preference(line: Fields) -> Preference:
    """{"prompt", "chosen", "rejected"}; or two conversations without a prompt, which is then what they share.

    Strings and messages may be mixed: see `alike`.
    """
    chosen, rejected = _text(line, "chosen"), _text(line, "rejected")
    if "prompt" in line:
        asked = _text(line, "prompt")
    elif isinstance(chosen, tuple) and isinstance(rejected, tuple):
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        asked, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not asked:
            raise ValueError("there is no prompt, and the two conversations do not begin alike")
    else:
        raise ValueError(f"prompt is missing: there are {', '.join(line)}")
    asked, (chosen, rejected) = alike(asked, (chosen, rejected))
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same answer")
    return Preference(asked, chosen, rejected)


def judged(line: Fields) -> Judged:
    """{"prompt", "completion" or "answer", "label"}, or {"text", "label"}; the label is true, false, 1 or 0."""
    label = line.get("label")
    if label not in (True, False) or not isinstance(label, bool | int):
        raise ValueError(f"label must be true or false, but is {label!r}")
    shown = demonstration({name: value for name, value in line.items() if name != "label"})
    return Judged(shown.prompt, shown.answer, bool(label))


def ranked(line: Fields) -> Ranked:
    """{"prompt", "answers"} best first, or with "ranks", 0 for the best; or a preference, as a ranking of two."""
    if "answers" not in line:
        return preference(line).ranked()
    answers = line["answers"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError("answers must be a list of two or more")
    asked, found = alike(_text(line, "prompt"), tuple(_text({"answers": each}, "answers") for each in answers))
    ranks = line.get("ranks", list(range(len(answers))))
    whole = isinstance(ranks, list) and all(isinstance(rank, int) and rank >= 0 for rank in ranks)
    if not whole or len(ranks) != len(answers):
        raise ValueError(f"ranks must be a number from 0 for each of {len(answers)} answers, but are {ranks!r}")
    if len(set(ranks)) < 2:
        raise ValueError("all ranks are equal, so that nothing is preferred")
    for first in range(len(found)):
        if any(found[first] == found[other] and ranks[first] != ranks[other] for other in range(first)):
            raise ValueError(f"answer {first + 1} stands there twice with different ranks")
    return Ranked(asked, found, tuple(ranks))


PARSERS: dict[str, Callable[[Fields], Any]] = {
    "prompts": prompt,
    "demonstrations": demonstration,
    "preferences": preference,
    "judged": judged,
    "ranked": ranked,
}


def alike(asked: Text, answers: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """A prompt and its answers as strings all, or as messages all if one of them is a conversation.

    As messages, a prompt is the user's and an answer the assistant's. An answer that is the whole conversation begins
    with its prompt, which is then left out of it.

    Raises:
        ValueError: for an answer that, without its prompt, does not begin with the assistant's message; or an empty
            prompt that is not a string among strings.
    """
    if all(isinstance(each, str) for each in (asked, *answers)):
        return asked, tuple(answers)
    if not asked:
        raise ValueError("the prompt is empty, but an answer is a conversation")
    asked = _messages(asked, "user")
    return asked, tuple(_without(asked, _messages(answer, "assistant")) for answer in answers)


def _messages(value: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": value},) if isinstance(value, str) else tuple(value)


def _without(asked: tuple[Message, ...], answer: tuple[Message, ...]) -> tuple[Message, ...]:
    if len(answer) > len(asked) and answer[: len(asked)] == asked:
        answer = answer[len(asked) :]
    if answer[0]["role"] != "assistant":
        raise ValueError(
            f"an answer must begin with the assistant's message or with the whole prompt, "
            f"but begins with one of the role {answer[0]['role']!r}"
        )
    return answer


def _text(line: Fields, name: str) -> Text:
    """A string or a conversation, which must not be empty; a prompt may be."""
    if name not in line:
        raise ValueError(f"{name} is missing: there {'are ' + ', '.join(line) if line else 'is nothing'}")
    value = line[name]
    if isinstance(value, str):
        if not value and name != "prompt":
            raise ValueError(f"{name} is empty")
        return value
    if isinstance(value, Sequence) and value and all(map(_is_message, value)):
        return tuple(value)
    raise ValueError(f'{name} must be a string or a list of {{"role", "content"}}, but is {str(value)[:60]!r}')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))

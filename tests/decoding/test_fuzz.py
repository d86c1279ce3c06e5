"""Random combinations of models, transforms, constraints, ends, rows and decoders, against a decoder in plain Python.

A case is (structure, number): the structure decides what is compiled, the number all values. Both are seeds.
"""

import functools
import itertools
import json
import math
import re

import jax
import numpy as np
import pytest

from jaxrl_llm.decoding import (
    PromptLookup,
    constraints,
    core,
    generate,
    generate_many,
    speculative_generate,
    stop_strings,
    transforms,
)
from jaxrl_llm.decoding.beam import beam_search
from jaxrl_llm.decoding.healing import healing
from jaxrl_llm.tabular import TabularLM
from tests.conftest import TINY, log_softmax, random_params
from tests.decoding.decoders import apply, params_of
from tests.decoding.test_grammars import BRACKETS, followers, lark_of

STRUCTURES, NUMBERS = 25, 20
LETTERS = "ab()"
SMALL = ["a", "b", "ab", "(", ")", "$"]
LARGE = [*SMALL, "()", "ba", "1", "2", "3", "12", "-", "tr", "ue", "true", " ", "x", "y", "z", "ab(", b"\xc3", b"\xa9"]
TABLE = TabularLM(vocab_size=len(SMALL), horizon=7)
MODELS = {"table": (TABLE, random_params(TABLE)), "gpt2": (TINY["gpt2"], params_of("gpt2"))}
PIECES = {"table": SMALL, "gpt2": LARGE}
END, NEVER, ROWS = 5, 10**6, 3
draw = jax.jit(core.sample)


def encoded(name):
    return [piece.encode() if isinstance(piece, str) else piece for piece in PIECES[name]]


@functools.lru_cache(maxsize=100_000)
def logits_after(name, text):
    """The model's logits after a text, by a pass without a cache."""
    lm, params = MODELS[name]
    tokens, mask = np.zeros((1, 40), int), np.zeros((1, 40), bool)
    start = int(name == "table")  # the first column: the root
    tokens[0, start : start + len(text)], mask[0, start : start + len(text)] = text, True
    return np.asarray(apply(lm, params, tokens, mask), np.float64)[0, start + len(text) - 1]


# Transforms, each with its definition in plain Python -----------------------------------------------------------------


def keep(logits, kept):
    return np.where(kept, logits, -np.inf)


def smallest_set(logits, scores, p):
    """The best scores that fill a mass of p, with ties."""
    probabilities, total = np.exp(log_softmax(logits)), 0.0
    if p >= 1:
        return logits > -np.inf
    for score in sorted({float(each) for each in scores[logits > -np.inf]}, reverse=True):
        total += probabilities[scores == score].sum()
        if total >= p:
            return scores >= score
    return np.ones(len(logits), bool)


def information(logits):
    logp = log_softmax(logits)
    possible = logp > -np.inf
    entropy = -sum(np.exp(logp[possible]) * logp[possible])
    return np.where(possible, -np.abs(np.where(possible, -logp, 0) - entropy), -np.inf)


def at_least(logits, threshold):
    return keep(logits, (logits >= threshold) | (logits == logits.max()))


def eta(logits, e):
    logp = log_softmax(logits)
    entropy = -sum(np.exp(each) * each for each in logp if each > -np.inf)
    return keep(logits, (logp >= math.log(min(e, math.sqrt(e) * math.exp(-entropy)))) | (logits == logits.max()))


def sigma(logits, n):
    return at_least(logits, logits.max() - n * np.std(logits[logits > -np.inf]))


def counts(tokens, vocab):
    return np.bincount(np.asarray(tokens, int), minlength=vocab)


def no_repeat(logits, text, n):
    grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    left = keep(logits, [(*text[len(text) - n + 1 :], v) not in grams or len(text) < n - 1 for v in range(len(logits))])
    return left if (left > -np.inf).any() else logits


def penalised(logits, text, r):
    return np.where(counts(text, len(logits)) > 0, np.where(logits > 0, logits / r, logits * r), logits)


def mirostat(case, row, new, logits, tau, rate):
    mu = 2 * tau
    for end, token in enumerate(new):
        surprise = -log_softmax(case.logits(row, new[:end]))[token] / math.log(2)
        mu -= rate * (surprise - tau)
    return at_least(logits, np.logaddexp.reduce(logits) - math.log(2) * mu)


T = transforms
NUMERIC = {  # the class, its number, and what it does to (case, row, text, new tokens, logits)
    "temperature": (T.Temperature, (0.4, 2.0), lambda c, r, text, new, z, x: z / x),
    "top p": (T.TopP, (0.3, 1.0), lambda c, r, text, new, z, x: keep(z, smallest_set(z, z, x))),
    "min p": (T.MinP, (0.0, 0.5), lambda c, r, text, new, z, x: at_least(z, z.max() + math.log(x))),
    "typical": (T.Typical, (0.3, 1.0), lambda c, r, text, new, z, x: keep(z, smallest_set(z, information(z), x))),
    "epsilon": (T.Epsilon, (0.0, 0.2), lambda c, r, text, new, z, x: at_least(z, math.log(x) + lse(z))),
    "eta": (T.Eta, (0.0, 0.3), lambda c, r, text, new, z, x: eta(z, x)),
    "sigma": (T.TopNSigma, (0.2, 2.0), lambda c, r, text, new, z, x: sigma(z, x)),
    "repetition": (T.RepetitionPenalty, (0.5, 2.0), lambda c, r, text, new, z, x: penalised(z, text, x)),
    "presence": (T.PresencePenalty, (-1.0, 2.0), lambda c, r, text, new, z, x: z - x * (counts(new, len(z)) > 0)),
    "frequency": (T.FrequencyPenalty, (-1.0, 2.0), lambda c, r, text, new, z, x: z - x * counts(new, len(z))),
}
WHOLE = {
    "top k": (T.TopK, (1, 5), lambda c, r, text, new, z, x: keep(z, z >= sorted(z)[-min(x, len(z))])),
    "ngram": (T.NoRepeatNgram, (1, 4), lambda c, r, text, new, z, x: no_repeat(z, text, x)),
}


def lse(logits):
    return np.logaddexp.reduce(logits)


def writes(piece, text):
    """True if a token writes a part of a text, or all of it and more."""
    return bool(piece) and (piece.startswith(text) or text.startswith(piece))


class Case:
    """A random request, for the library and for the plain decoder."""

    def __init__(self, structure, number):
        shape, self.value = np.random.default_rng(structure), np.random.default_rng([structure, number])
        self.name = shape.choice(["table", "gpt2"])
        self.decoder = ["sample", "greedy", "many", "beam", "look-up"][structure % 5]
        self.pieces, self.vocab = encoded(self.name), len(PIECES[self.name])
        self.greedy = self.decoder in ("greedy", "look-up")
        self.n = int(shape.integers(1, 3)) if self.decoder == "sample" else 1
        self.rows = ROWS * self.n
        self.per_row, self.padding = bool(shape.integers(2)), shape.choice(["left", "right", "between", "lists"])
        least, most, new = (0, 3, 4) if self.name == "table" else (1, 10, 7)
        lengths = self.value.integers(least, most + 1, ROWS)
        self.prompts = [tuple(self.value.integers(0, self.vocab, length).tolist()) for length in lengths]
        self.limits = np.broadcast_to(self.value.integers(1, new + 1, self.rows), self.rows)
        self.eos = [END, int(self.value.choice([NEVER, self.value.integers(self.vocab)]))]
        self.least, self.chain, self.steps = 0, [], []
        self.texts = [b""] * self.rows
        kinds = ["none", "regex", "star", "choices", "grammar", "json", "heal"]
        constraint = shape.choice(kinds, p=[0.22, *[0.13] * 6])
        if constraint != "none":
            self._constrain(constraint)
        kinds = [*NUMERIC, *WHOLE, "bias", "bad words", "least", "ban", "text bias", "mirostat"]
        for kind in shape.permutation(kinds)[: shape.integers(1, 6)]:
            self._add(kind)
        self.strings = []
        if shape.integers(2):
            self.strings = ["".join(self.value.choice(list(LETTERS), size)) for size in self.value.integers(1, 4, 2)]
        self.penalty, self.width = float(self.value.choice([-0.5, 0.0, 1.0])), int(shape.integers(1, 4))

    def _number(self, low, high):
        whole = isinstance(low, int)
        values = self.value.integers(low, high, self.rows) if whole else self.value.uniform(low, high, self.rows)
        values = values.astype(np.int32 if whole else np.float32)
        return values if self.per_row else np.full(self.rows, values[0])

    def _add(self, kind):
        def given(values):
            return jax.numpy.asarray(values) if self.per_row else values[0].item()

        if kind in NUMERIC or kind in WHOLE:
            cls, bounds, step = (NUMERIC | WHOLE)[kind]
            values = self._number(*bounds)
            self.chain.append(cls(given(values)))
            self.steps.append(lambda row, text, new, z: step(self, row, text, new, z, values[row].item()))
        elif kind == "mirostat":
            tau, rate = self._number(1.0, 4.0), self._number(0.0, 1.0)
            self.chain.append(T.Mirostat(given(tau), given(rate)))
            self.steps.append(lambda row, text, new, z: mirostat(self, row, new, z, tau[row].item(), rate[row].item()))
        elif kind == "bias":
            bias = np.where(self.value.random(self.vocab) < 0.1, -np.inf, self.value.normal(size=self.vocab))
            self.chain.append(T.LogitBias(bias.astype(np.float32)))
            self.steps.append(lambda row, text, new, z: z + bias.astype(np.float32))
        elif kind == "bad words":
            words = [self.value.integers(0, self.vocab, size).tolist() for size in (3, 2)]
            self.chain.append(T.bad_words(self.vocab, words))
            self.steps.append(
                lambda row, text, new, z: keep(
                    z, [all([*text, v][-len(word) :] != word for word in words) for v in range(self.vocab)]
                )
            )
        elif kind == "least":
            count = self.least = int(self.value.integers(0, 4))
            self.chain.append(T.MinLength(count, self.eos))
            ends = np.isin(np.arange(self.vocab), self.eos)
            self.steps.append(lambda row, text, new, z: keep(z, ~ends | (len(new) >= count)))
        else:
            string = "".join(self.value.choice(list(LETTERS), self.value.integers(1, 4)))
            add = -math.inf if kind == "ban" else float(self.value.normal())
            build = constraints.banned_text if kind == "ban" else constraints.text_bias
            self.chain.append(build(self.pieces, string, *([] if kind == "ban" else [add])))
            self.steps.append(
                lambda row, text, new, z: np.where(
                    [self.completes(new, v, string) for v in range(self.vocab)], z + add, z
                )
            )

    def completes(self, new, token, string):
        """True if the string stands once more in the text with this token."""
        before, piece, end = self.written(new), self.pieces[token], string.encode()
        places = range(len(before) + 1, len(before) + len(piece) + 1)
        return any((before + piece)[:place].endswith(end) for place in places)

    def written(self, new):
        return b"".join(self.pieces[token] for token in new)

    def _constrain(self, kind):
        def some():
            return "".join(self.value.choice(list(LETTERS), self.value.integers(1, 3)))

        if kind == "grammar":
            rules = {"start": [*BRACKETS["start"], [str(self.value.choice(["a", "b"])), "start"]]}
            texts = [b"" if token in self.eos else piece for token, piece in enumerate(self.pieces)]
            self.chain.append(
                constraints.from_grammar(lark_of(rules), texts, self.eos[: 1 + (self.eos[1] < self.vocab)])
            )
            ends = set(self.eos)

            def allowed(new):
                found = followers(rules, [*texts, b"$"], tuple(new))
                last = len(texts)
                return (found - {last}) | (ends if last in found else set())

            self.steps.append(lambda row, text, new, z: keep(z, np.isin(np.arange(self.vocab), list(allowed(new)))))
            return
        if kind == "heal":
            self.texts = [
                "".join(self.value.choice(list(LETTERS), self.value.integers(0, 4))) for _ in range(self.rows)
            ]
            self.texts = [text.encode() for text in self.texts]
            self.chain.append(healing(self.pieces, self.texts))
            self.limits = np.maximum(self.limits, [self.to_write(text) for text in self.texts])

            def begun(row, new):
                rest, left = self.texts[row][len(self.written(new)) :], self.limits[row] - len(new) - 1
                return [
                    not rest or (writes(piece, rest) and self.to_write(rest[len(piece) :]) <= left)
                    for piece in self.pieces
                ]

            self.steps.append(lambda row, text, new, z: keep(z, begun(row, new)))
            return
        if kind == "json" and self.name == "gpt2":
            low = int(self.value.choice([-3, 1, 11, 21]))
            high = low + int(self.value.integers(0, 20))
            schema = self.value.choice(
                [{"type": "integer", "minimum": low, "maximum": high}, {"enum": [True, low, 12]}, {"type": "boolean"}]
            )
            every = [*range(low, high + 1)] if "minimum" in schema else schema.get("enum", [True])
            language, automaton = frozenset(map(json.dumps, every)), constraints.from_json_schema(schema, self.pieces)
        elif kind == "choices":
            language = frozenset(some() for _ in range(3))
            automaton = constraints.from_choices(sorted(language), self.pieces)
        else:
            group = f"({re.escape(some())}|{re.escape(some())})"
            star = kind == "star" and self.name == "table"
            pattern = f"{group}*" if star else f"{group}{{1,2}}({re.escape(some())})?"
            language, automaton = matches(pattern), constraints.from_regex(pattern, self.pieces)
        ends = [each for each in self.eos if each < self.vocab]
        distance = token_distance(language, tuple(b"" if v in ends else p for v, p in enumerate(self.pieces)))
        if distance(b"") >= NEVER:
            with pytest.raises(ValueError, match="the automaton accepts no text"):
                constraints.Constrained(automaton, ends)
            self.eos, ends = [END, NEVER], [END]
            distance = token_distance(language, tuple(b"" if v in ends else p for v, p in enumerate(self.pieces)))
        self.limits = np.maximum(self.limits, distance(b""))
        self.chain.append(constraints.Constrained(automaton, ends))

        def fits(new, remaining):
            content = self.written(new)
            return [
                distance(content) == 0 if v in ends else bool(piece) and distance(content + piece) <= remaining - 1
                for v, piece in enumerate(self.pieces)
            ]

        self.steps.append(lambda row, text, new, z: keep(z, fits(new, self.limits[row] - len(new))))

    def to_write(self, text):
        """The fewest tokens that write a text, or more than it."""
        ways = [self.to_write(text[len(piece) :]) for piece in self.pieces if writes(piece, text)] if text else [-1]
        return 1 + min(ways)

    # The plain decoder -----------------------------------------------------------------------------------------------

    def prompt(self, row):
        return self.prompts[row // self.n]

    def logits(self, row, new):
        return logits_after(self.name, (*self.prompt(row), *new))

    def warped(self, row, new):
        z = self.logits(row, new)
        for step in self.steps:
            if (z > -np.inf).any():
                z = step(row, (*self.prompt(row), *new), tuple(new), z)
        return z

    def ends(self, row, new):
        """Why a row ends after these tokens, or None."""
        within = sum(len(self.written(new[:end])) < len(self.texts[row]) for end in range(len(new)))
        searched = self.written(new[max(self.least - 1, within, 0) :])
        if new and new[-1] in self.eos:
            return "eos"
        if new and any(each.encode() in searched for each in self.strings):
            return "stop"
        return "length" if len(new) == self.limits[row] else None

    def one_row(self, row):
        """The tokens, their log-probabilities under the model and the sampler, and why the row ended."""
        new, logps, sampled = [], [], []
        while self.ends(row, new) is None:
            warped = self.warped(row, new)
            if not (warped > -np.inf).any():
                return new, logps, sampled, "none"
            if self.greedy:
                token = int(warped.argmax())
            else:
                key = jax.random.fold_in(jax.random.fold_in(self.key, row), len(new))
                token = int(draw(key[None], warped.astype(np.float32)[None])[0])
            logps.append(log_softmax(self.logits(row, new))[token])
            sampled.append(0.0 if self.greedy else log_softmax(warped)[token])
            new = [*new, token]
        return new, logps, sampled, self.ends(row, new)

    def beams(self, row):
        """Beam search with lists: (tokens, log-probability, score), best first."""
        reweighs, count, width = self.transform.reweighs, int(self.limits[row]), self.width
        live, finished = [((), 0.0)], []

        def score(tokens, log_prob):
            return log_prob / len(tokens) ** self.penalty

        for time in range(1, count + 1):
            options = []
            for tokens, log_prob in live:
                warped = self.warped(row, list(tokens))
                if (warped > -np.inf).any():
                    logp = log_softmax(warped if reweighs else self.logits(row, list(tokens)))
                    options += [((*tokens, v), log_prob + logp[v]) for v in np.flatnonzero(warped > -np.inf).tolist()]
            options.sort(key=lambda option: -option[1])
            over = [self.ends(row, list(tokens)) in ("eos", "stop") for tokens, _ in options]
            ended = [option for option, ends in zip(options[:width], over, strict=False) if ends]
            live = [option for option, ends in zip(options, over, strict=True) if not ends][:width]
            finished += ended + (live if time == count else [])
            finished = sorted(finished, key=lambda each: -score(*each))[:width]
            if len(finished) == width:
                worst = score(*finished[-1])
                hope = [log_prob / t**self.penalty for _, log_prob in live for t in range(time + 1, count + 1)]
                live = live if any(each > worst for each in hope) else []
        return [(tokens, log_prob, score(tokens, log_prob)) for tokens, log_prob in finished]

    # The library -----------------------------------------------------------------------------------------------------

    key = jax.random.key(11)

    @property
    def transform(self):
        return transforms.Chain(tuple(self.chain))

    def found(self):
        width, prompts, mask = 11, self.prompts, None
        if self.padding != "lists" or len(set(map(len, prompts))) == 1:
            prompts, mask = self.value.integers(0, self.vocab, (ROWS, width)), np.zeros((ROWS, width), bool)
            for row, prompt in enumerate(self.prompts):
                size = len(prompt)
                slots = {"left": np.arange(width - size, width), "right": np.arange(size)}.get(self.padding)
                slots = np.sort(self.value.permutation(width)[:size]) if slots is None else slots
                prompts[row, slots], mask[row, slots] = prompt, True
        stop = stop_strings(self.pieces, self.strings) if self.strings else None
        options = {"max_new_tokens": self.limits, "transform": self.transform, "stop": stop, "eos_id": self.eos}
        options |= {"prompt_mask": mask, "pad_id": 1}
        model = (*MODELS[self.name], [list(each) for each in prompts] if mask is None else prompts)
        if self.decoder == "beam":
            return beam_search(*model, num_beams=self.width, length_penalty=self.penalty, **options)
        if self.decoder == "many":
            return generate_many(*model, rows=2, key=self.key, **options)
        if self.decoder == "look-up":
            return speculative_generate(*model, draft=PromptLookup(2), greedy=True, **options).generation
        if self.decoder == "greedy":
            return generate(*model, greedy=True, **options)
        return generate(*model, key=self.key, n=self.n, **options)

    def check(self):
        """Compare; returns the reasons why rows ended."""
        if self.decoder == "beam":
            found = self.found()
            for row in range(self.rows):
                self._check_beams(found, row, self.beams(row))
            return ["beam"] * self.rows
        expected = [self.one_row(row) for row in range(self.rows)]
        if dead := [(row, len(each[0])) for row, each in enumerate(expected) if each[3] == "none"]:
            with pytest.raises(FloatingPointError, match=f"in row {dead[0][0]} at new token {dead[0][1]}:"):
                self.found()
            return ["none"]
        found = jax.tree.map(np.asarray, self.found())
        for row, (new, logps, sampled, _) in enumerate(expected):
            mask = found.mask[row]
            assert found.tokens[row][mask].tolist() == new and mask[: len(new)].all()
            np.testing.assert_allclose(found.logp[row][mask], logps, atol=2e-4)
            np.testing.assert_allclose(found.logp_sampler[row][mask], sampled, atol=2e-4, rtol=1e-4)
            assert (found.tokens[row][~mask] == 1).all() and not found.logp[row][~mask].any()
        return [each[3] for each in expected]

    def _check_beams(self, found, row, expected):
        mask = np.asarray(found.mask[row])
        tokens = [tuple(t[m].tolist()) for t, m in zip(np.asarray(found.tokens[row]), mask, strict=True) if m.any()]
        assert tokens == [each[0] for each in expected]
        for place, (tokens, log_prob, score) in enumerate(expected):
            np.testing.assert_allclose(found.log_prob[row, place], log_prob, atol=5e-4, rtol=1e-4)
            np.testing.assert_allclose(found.score[row, place], score, atol=5e-4, rtol=1e-4)
            logps = [log_softmax(self.logits(row, list(tokens[:t])))[tokens[t]] for t in range(len(tokens))]
            np.testing.assert_allclose(np.asarray(found.logp[row, place])[mask[place]], logps, atol=2e-4)


@functools.lru_cache(maxsize=1000)
def matches(pattern):
    """All texts of up to 8 of the letters that `re` matches."""
    texts = ("".join(letters) for length in range(9) for letters in itertools.product(LETTERS, repeat=length))
    return frozenset(text for text in texts if re.fullmatch(pattern, text))


@functools.lru_cache(maxsize=1000)
def token_distance(language, pieces):
    """The fewest tokens after which a text can be one of the language, as a function of the text."""
    texts = {text.encode() for text in language}
    begun = {text[:end] for text in texts for end in range(len(text) + 1)}

    @functools.cache
    def distance(content):
        if content in texts:
            return 0
        ways = [distance(content + piece) for piece in pieces if piece and content + piece in begun]
        return 1 + min(ways, default=NEVER)

    return lambda content: distance(content) if content in begun else NEVER


@pytest.mark.slow
@pytest.mark.parametrize("structure", [0, 1, 3])
def test_some_combinations_are_those_of_the_plain_decoder(structure):
    for number in range(6):
        Case(structure, number).check()


@pytest.mark.slow
@pytest.mark.parametrize("structure", range(STRUCTURES))
def test_all_combinations_are_those_of_the_plain_decoder(structure):
    for number in range(NUMBERS):
        Case(structure, number).check()

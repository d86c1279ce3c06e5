"""The public interface: a loaded model takes strings and returns strings; arrays are one attribute away.

    import jaxrl_llm as jl

    lm = jl.load("tiny-gpt2")
    lm.generate("I have a dream", max_new_tokens=20, temperature=0.8, n=2)

Every method encodes its texts, calls the functional layer (`jaxrl_llm.decoding`, `jaxrl_llm.scoring`,
`jaxrl_llm.analysis`) on `lm.model` and `lm.params`, and wraps the result. Prompts and texts are a string, a list of
strings, a list of token ids, a list of such lists (of any lengths) or an integer array [time] or [batch, time].
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxrl_llm import decoding, models, plots, scoring, strategies, text, translation
from jaxrl_llm import decoding_options as options_of
from jaxrl_llm import mesh as meshes
from jaxrl_llm.analysis import attention, landscape
from jaxrl_llm.decoding import healing, tree
from jaxrl_llm.decoding.transforms import Chain, Temperature, TopK, TopP, Transform
from jaxrl_llm.decoding_options import Sampling, Search, Strategy, TreeSearch
from jaxrl_llm.language_model import LanguageModel, Params, params_dtype
from jaxrl_llm.models.conditional import Conditional
from jaxrl_llm.models.heads import is_reward
from jaxrl_llm.models.layers import Form
from jaxrl_llm.numerics import on_device
from jaxrl_llm.options import Range, takes

if TYPE_CHECKING:  # only a picture takes the time to load it
    from matplotlib.figure import Figure

Conversation = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | Conversation
InChat = bool | Mapping[str, Any]  # a prompt in the chat template, and variables of the template
Prompts = str | Sequence[Prompt] | Int[np.ndarray, "..."] | Sequence[int]

SHOWN = 100  # characters of a text in a repr
NODES = 64  # of a tree whose distributions are computed together
SCORED_BUCKET = 32  # tokens to a multiple of which a text is padded
_top = jax.jit(scoring.top_log_probs, static_argnames=("lm", "k"))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Completion:
    """The continuation of one prompt; `print` writes its text."""

    text: str | None
    """The new text, without the prompt (all of it, with `heal` too) and without a stop string; None if the model has no
    tokenizer."""
    tokens: list[int]
    """The new tokens; a final EOS, or the token that completes a stop string, is one of them. With `heal` they follow
    the prompt without its last tokens (`details["healed"]` many), whose text they begin with."""
    logp: Float[np.ndarray, "time"]
    """Log-probability of each new token under the model at temperature 1, in nats."""
    log_prob: float
    """Their sum; of sampled beams and of beams with penalties, under the distribution after all transforms; of beams
    with regex or choices, that of all hypotheses of the text."""
    finish_reason: Literal["eos", "stop", "length"]
    """"eos" at an EOS token of the model, "stop" at a stop string, "length" at `max_new_tokens`."""
    prompt: Prompt
    """The prompt that it continues, as it was given."""
    index: int
    """The place of that prompt among the prompts."""
    details: dict[str, float]
    """Further numbers of the strategy, such as the accepted drafts of speculative decoding."""

    def __str__(self) -> str:
        return str(self.tokens) if self.text is None else self.text

    def __repr__(self) -> str:
        shown = self.tokens if self.text is None else self.text
        return (
            f"Completion({_short(shown)}, log_prob={self.log_prob:.2f}, {len(self.tokens)} tokens, "
            f"finish_reason={self.finish_reason!r})"
        )


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class TextTree:
    """A search tree with its texts."""

    tree: decoding.Tree
    described: dict[str, Any]
    """Nodes with text, probability and score, as plain data (`decoding.tree.describe`)."""
    model: str
    describe_nodes: Callable[[Sequence[int]], list[dict[str, Any]]]
    """The distributions over the token after nodes, as plain data."""

    @property
    def best(self) -> str:
        """The prompt continued to the leaf of the highest score."""
        return self.described["best_text"]

    @property
    def score(self) -> float:
        """Σ log p / length of that leaf, in nats per token."""
        return self.described["best_score"]

    def distributions(self, nodes: int | Sequence[int] | Literal["all"] = 0) -> list[dict[str, Any]]:
        """Return the most probable tokens after nodes, with those that the selection keeps and those in the tree.

        Args:
            nodes: 0 is the prompt; the others are numbered level by level from 1, in the order of `described["nodes"]`,
                in which the figure has them from top to bottom. "all" are all that have children.

        Raises:
            ValueError: for a node that is not in the tree or has no children.
        """
        if nodes == "all":
            nodes = sorted({node.parent for node in self.tree.nodes()})
        return self.describe_nodes([nodes] if isinstance(nodes, numbers.Integral) else list(nodes))

    def plot(self, *, color: Literal["score", "probability"] = "score") -> Figure:
        """Draw the tree, with nodes in the colour of their score or of their token's probability.

        A notebook shows the figure.
        """
        return plots.style.shown(plots.tree.tree_figure(self.described, model=self.model, color=color))

    def plot_bars(self, nodes: int | Sequence[int] | Literal["all"] = 0) -> Figure:
        """Draw `distributions` as bars, with tokens that are kept and drawn; a notebook shows the figure."""
        title = f"{self.described['title']}, {self.model}"
        return plots.style.shown(plots.charts.bars_figure(self.distributions(nodes), title=title))

    def __repr__(self) -> str:
        leaves = len(self.tree.leaves())
        return f"TextTree({leaves} leaves, best: {_short(self.best)} with {self.score:.4f} nats per token)"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class TextAttention:
    """The attention maps of a text."""

    maps: attention.AttentionMaps
    model: str

    @property
    def weights(self) -> Float[np.ndarray, "layer head query key"]:
        """The attention weights; each row sums to 1."""
        return self.maps.weights

    def plot(self, *, layer: int | None = None, head: int | None = None) -> Figure:
        """Draw one head, or all heads of those that are not given; a notebook shows the figure.

        Args:
            layer, head: counted from 0, or from −1 backwards.
        """
        return plots.style.shown(plots.attention.attention_figure(self.maps, layer=layer, head=head, model=self.model))

    def __repr__(self) -> str:
        layers, heads, queries, keys = self.weights.shape
        return (
            f"TextAttention({self.maps.name} of {_short(self.maps.source)}: "
            f"{layers} layers, {heads} heads, {queries} queries, {keys} keys)"
        )


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class TextLandscape:
    """The loss of a text over a plane of two directions around the model."""

    surface: landscape.Surface
    model: str

    def plot(self) -> Figure:
        """Draw the surface; a notebook shows the figure."""
        return plots.style.shown(plots.landscape.landscape_figure(self.surface, model=self.model))

    def html(self) -> str:
        """Return a self-contained page with an interactive 3-D plot (needs the extra `interactive`).

        `pathlib.Path("landscape.html").write_text(found.html(), encoding="utf-8")` writes it for a browser. In
        Jupyter `IPython.display.IFrame("landscape.html", "100%", 600)` then shows it, in a frame, so that the page's
        style does not reach the notebook; `IPython.display.HTML(found.html())` shows it without a file and a frame.

        Raises:
            ModuleNotFoundError: without plotly.
        """
        return plots.interactive.surface_html([self.surface], title=self.surface.title)

    def __repr__(self) -> str:
        loss = self.surface.loss
        return (
            f"TextLandscape({_short(self.surface.title)}: {loss.shape[0]} × {loss.shape[1]} points, "
            f"{self.surface.centre:.4f} {self.surface.unit} at the centre, {np.nanmin(loss):.4f} at the minimum"
            f"{'' if self.surface.residuals is None else ', directions not converged'})"
        )


class Stream(Iterator[str]):
    """The text of a completion in pieces; `completion` is the whole once they have ended, and None before."""

    def __init__(
        self,
        pieces: Iterator[decoding.Generation],
        texts: text.TextStream,
        completed: Callable[[decoding.Generation], Completion],
    ):
        self.completion: Completion | None = None
        self._texts = self._read(pieces, texts, completed)

    def _read(
        self,
        pieces: Iterator[decoding.Generation],
        texts: text.TextStream,
        completed: Callable[[decoding.Generation], Completion],
    ) -> Iterator[str]:
        read = []
        for piece in pieces:
            read.append(jax.tree.map(np.asarray, piece))
            yield texts.push(read[-1].tokens[0][read[-1].mask[0]].tolist())
        self.completion = completed(jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *read))
        yield texts.finish()

    def __next__(self) -> str:
        return next(self._texts)


def _options(keywords: Mapping[str, Any]) -> tuple[Sampling, Search]:
    names = {field.name for field in dataclasses.fields(Sampling)}
    if keywords.get("choices") is not None and not keywords["choices"] and keywords["choices"] != Sampling.choices:
        raise ValueError("choices must hold at least one string, but is empty.")
    chosen = {name: value for name, value in keywords.items() if name in names}
    return Sampling(**chosen), Search(**{name: value for name, value in keywords.items() if name not in names})


def _on_its_mesh(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of an `LM` set the mesh on which the parameters lie, if they lie on one."""

    @functools.wraps(method)
    def run(self: LM, *arguments: Any, **options: Any) -> Any:
        with meshes.on_mesh_of(self.params):
            return method(self, *arguments, **options)

    return run


class LM:
    """A language model with its parameters and its tokenizer.

    `lm.model` and `lm.params` are the arguments of the functional layer:
    `jl.decoding.generate(lm.model, lm.params, tokens, ...)`.

    Args:
        loaded: the model (also a `TabularLM`), its parameters, its tokenizer or None, and its `config.json`.
        name: for messages and figures.
        path: the name or path that it can be loaded from, if any, which an adapter of it records.
    """

    def __init__(self, loaded: models.Loaded, name: str = "model", *, path: str = ""):
        self.loaded, self.name, self.path = loaded, name, path

    @property
    def model(self) -> LanguageModel | models.T5:
        """The model, a pure function of its parameters."""
        return self.loaded.model

    @property
    def params(self) -> Params:
        """The parameters, a plain nested dict of arrays."""
        return self.loaded.params

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of Hugging Face's kind, or None."""
        return self.loaded.tokenizer

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`."""
        return self.loaded.config

    @functools.cached_property
    def eos_ids(self) -> list[int]:
        """The tokens that end a text: the tokenizer's and the configuration's."""
        return text.eos_ids(self.tokenizer, self.config | {"vocab_size": self.model.vocab_size})

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token adds to a text."""
        return text.token_bytes(self._require_tokenizer(), self.model.vocab_size)

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        context = getattr(self.model, "max_length", None)  # a T5 has none
        kind = self.model.config.name if isinstance(self.model, models.Decoder) else type(self.model).__name__
        parts = [kind, f"{_rounded(size)} parameters", f"vocabulary {self.model.vocab_size}"]
        parts += [] if context is None else [f"context {context}"]
        return f"LM({self.name}: {', '.join(parts)}, {params_dtype(self.params)})"

    # Decoding ---------------------------------------------------------------------------------------------------------

    @takes(Sampling, Search)
    @_on_its_mesh
    def generate(
        self,
        prompts: Prompts,
        *,
        strategy: Strategy = "sample",
        greedy: bool = False,
        n: int = 1,
        chat: InChat = False,
        transforms: Sequence[Transform] = (),
        batch_size: int | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Continue each prompt, or translate it with an encoder-decoder.

        Args:
            prompts: one or several, as the module says; with `chat` also conversations, lists of messages.
            strategy: a decoding strategy; all of them share the options, and refuse those that they do not use (one
                that is given with its default value counts as not given).
            greedy: the same as `strategy="greedy"`.
            n: completions of each prompt; of a beam search its best hypotheses.
            chat: put each prompt into the model's chat template, a string as a user's message; or variables of the
                template, such as {"tools": [...]}.
            transforms: further logits transforms (`jl.decoding.transforms`), applied after those of the options.
            batch_size: completions (of beams, prompts) that are decoded together; by default all. The texts do not
                depend on it, as far as rounding lets them: each completion draws by its own index.

        Options: listed here.

        Returns:
            n completions of the first prompt, then n of the second, and so on (fewer of a beam search that finds
            fewer): a list also for a single prompt.

        Raises:
            TypeError: for prompts of another type, or an unknown option.
            ValueError: for an option that is out of range or that the strategy does not use, a prompt that is empty or
                does not fit the context, or strings without a tokenizer.
            FloatingPointError: if the model's logits are NaN, or no token is possible.
        """
        sampling, search = _options(options)
        strategy = options_of.chosen(strategy, greedy=greedy)
        options_of.check(strategy, sampling, search, n=n, named=options)
        given, rows = self._encoded(prompts, chat=chat, sampling=sampling)
        beam = options_of.is_beam(strategy)
        if batch_size is not None:
            options_of.COMPLETIONS.check("batch_size", batch_size, integer=True)
        # A prompt is read once for all its samples, if they are in one batch.
        copies = n if strategy == "sample" and not self._translates and not (batch_size or 0) % n else 1
        indices = [index for index in range(len(rows)) for _ in range(1 if beam else n)]
        read = [rows[i] for i in indices[::copies]]
        parts = _parts(read, len(read) if batch_size is None else batch_size // copies)
        request = self._request(strategy, parts[0], sampling, search, transforms, chat=chat)
        request = dataclasses.replace(request, n=copies)
        found = strategies.run(strategy, request)
        for part in parts[1:]:
            own = self._read(part, sampling, chat=chat)
            request = dataclasses.replace(request, **own, first=request.first + len(part))
            found += strategies.run(strategy, request)
        return [
            self._completion(hypothesis, given[index], index, request, self._stream(rows[index], sampling, chat=chat))
            for index, hypotheses in zip(indices, found, strict=False)  # the last batch may be filled up
            for hypothesis in hypotheses[: n if beam else 1]
        ]

    @takes(Sampling)
    @_on_its_mesh
    def generate_many(
        self,
        prompts: Prompts,
        *,
        rows: int = 32,
        greedy: bool = False,
        n: int = 1,
        chat: InChat = False,
        transforms: Sequence[Transform] = (),
        progress: bool = True,
        **options: Any,
    ) -> list[Completion]:
        """Continue thousands of prompts by continuous batching, with the completions of `generate`.

        Of `rows` texts that are decoded together, one that has ended makes room for the next prompt at once, where
        `generate` waits for the longest of a batch. The texts do not depend on `rows`, as far as rounding lets them.

        Args:
            prompts: all of them, of any lengths, in any order.
            rows: completions that are decoded together; memory grows with it.
            greedy, n, chat, transforms: as in `generate`.
            progress: show a progress bar.

        Options: listed here.

        Returns:
            n completions of the first prompt, then n of the second, and so on.

        Raises:
            TypeError, ValueError: as `generate` does, and for an encoder-decoder or a `guidance_prompt`.
        """
        sampling, search = _options(options)
        strategy = options_of.chosen("sample", greedy=greedy)
        options_of.check(strategy, sampling, search, n=n, named=options)
        if sampling.guidance_prompt is not None:
            raise ValueError("generate_many does not use guidance_prompt: generate does.")
        if sampling.context == "slide":
            raise ValueError("generate_many does not use context='slide': generate does.")
        if self._translates:
            raise ValueError("generate_many is for decoder-only models: translate takes a batch_size.")
        given, encoded = self._encoded(prompts, chat=chat, sampling=sampling)
        indices = [index for index in range(len(encoded)) for _ in range(n)]
        (whole,) = _parts([encoded[i] for i in indices], len(indices))
        request = self._request(strategy, whole, sampling, search, transforms, chat=chat)
        found = strategies.run_many(request, greedy=strategy == "greedy", rows=rows, progress=progress)
        return [
            self._completion(each, given[index], index, request, self._stream(encoded[index], sampling, chat=chat))
            for index, each in zip(indices, found[: len(indices)], strict=True)  # on a mesh rows are filled up
        ]

    @takes(Sampling, Search)
    def chat(
        self,
        messages: str | Conversation,
        *,
        strategy: Strategy = "sample",
        greedy: bool = False,
        transforms: Sequence[Transform] = (),
        **options: Any,
    ) -> Completion:
        """Return the model's reply to a user's message or a conversation, by its chat template.

        Args:
            messages: a string, or a list of {"role": ..., "content": ...}.
            strategy, greedy, transforms: as in `generate`.

        Options: listed here.

        Raises:
            ValueError: if the model has no chat template, or as `generate` does.
        """
        how = {"strategy": strategy, "greedy": greedy, "transforms": transforms}
        return self.generate([messages], chat=True, **how, **options)[0]

    @takes(Sampling)
    def stream(
        self,
        prompt: Prompt,
        *,
        greedy: bool = False,
        chat: InChat = False,
        transforms: Sequence[Transform] = (),
        memory: decoding.Memory | None = None,
        **options: Any,
    ) -> Stream:
        """Return an iterator over the text of `generate(prompt, ...)[0]`, in pieces as they are known.

        A piece never ends within a character, nor holds a part of a stop string. At the end the iterator's
        `completion` is the whole.

        Args:
            prompt: a single one.
            greedy, chat, transforms: as in `generate`.
            memory: what earlier calls have read; of a prompt that begins with it only the rest is read. It is not used
                if the context slides.

        Options: listed here.

        Raises:
            TypeError, ValueError: as `generate` does.
        """
        sampling, search = _options(options)
        strategy = options_of.chosen("sample", greedy=greedy)
        options_of.check(strategy, sampling, search, named=options)
        given, rows = self._encoded(prompt, chat=chat, sampling=sampling)
        if len(rows) > 1:
            raise ValueError(f"stream takes one prompt, but is given {len(rows)}: generate takes several.")
        self._require_tokenizer()

        def texts() -> text.TextStream:
            return self._stream(prompt_ids, sampling, chat=chat)

        def completed(generation: decoding.Generation) -> Completion:
            return self._completion(strategies.rows_of(generation)[0][0], given[0], 0, request, texts())

        prompt_ids = rows[0]
        with meshes.on_mesh_of(self.params):
            (rows,) = _parts(rows, 1) if memory is None else [rows]
            request = self._request(strategy, rows, sampling, search, transforms, chat=chat)
            greedily = strategy == "greedy"
            if sampling.context == "slide":
                pieces = decoding.slide_stream(*request.model, greedy=greedily, **request.token_by_token)
            else:
                pieces = decoding.stream(*request.model, greedy=greedily, memory=memory, **request.token_by_token)
        return Stream(self._each(pieces), texts(), completed)

    @takes(Sampling, Search)
    def beam_search(
        self,
        prompts: Prompts,
        *,
        n: int | None = None,
        num_groups: int = 1,
        chat: InChat = False,
        transforms: Sequence[Transform] = (),
        batch_size: int | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Return the hypotheses of beam search, best first: `generate` by the strategies beam and diverse-beam.

        Beams are sampled by `generate(..., strategy="sampled-beam")`.

        Args:
            prompts: one or several.
            n: hypotheses of each prompt; by default all `num_beams`.
            num_groups: more than one makes it diverse beam search, and so does `diversity_by`.
            chat, transforms, batch_size: as in `generate`.

        Options, as far as these strategies use them, as in `generate`.

        Returns:
            The hypotheses of the first prompt, then those of the second, and so on. `log_prob` is theirs under the
            model; they are ranked by log_prob / length**length_penalty.

        Raises:
            TypeError, ValueError: as `generate` does.
        """
        n = options.get("num_beams", Search.num_beams) if n is None else n
        diverse = num_groups != 1 or options.get("diversity_by", "token") != "token"
        how = {"strategy": "diverse-beam", "num_groups": num_groups} if diverse else {"strategy": "beam"}
        how |= {"chat": chat, "transforms": transforms, "batch_size": batch_size}
        return self.generate(prompts, n=n, **how, **options)

    @takes(TreeSearch)
    @_on_its_mesh
    def search_tree(self, prompt: Prompt, **options: Any) -> TextTree:
        """Grow the search tree of a prompt: every node is continued by several distinct tokens.

        Args:
            prompt: a single one.

        Options: listed here.

        Raises:
            TypeError: for a prompt of another type, or an unknown option.
            ValueError: for an option that is out of range or not used, or as `decoding.search_tree` does.
        """
        options = TreeSearch(**options)
        tokenizer = self._require_tokenizer()
        given, rows = self._encoded(prompt)
        if len(rows) > 1:
            raise ValueError(f"search_tree takes one prompt, but is given {len(rows)}.")
        filters = {
            "top-k": lambda: TopK(options.top_k),
            "nucleus": lambda: TopP(options.top_p, options.min_tokens_to_keep),
        }
        kept = [filters[options.select]()] if options.select in filters else []
        task = self._task(rows)
        select = "best" if options.select == "best" else Chain((Temperature(options.temperature), *kept))
        given_model = (task.lm, task.params, task.prompts[0][task.mask[0]])
        found = decoding.search_tree(
            *given_model,
            branching=options.branching,
            depth=options.depth,
            select=select,
            key=jax.random.key(options.seed),
            eos_id=self.eos_ids,
            score_length=options.score_length,
        )
        titles = {
            "best": "most probable",
            "sample": "sampled",
            "top-k": f"top-k, k = {options.top_k}",
            "nucleus": f"nucleus, p = {options.top_p}",
        }
        told = [titles[options.select], f"branching {options.branching}"]
        if options.min_tokens_to_keep is not None:
            told.insert(1, f"at least {options.min_tokens_to_keep}")
        if options.temperature != 1:
            told.append(f"T = {options.temperature:g}")
        start = given[0] if isinstance(given[0], str) else tokenizer.decode(rows[0])
        described = tree.describe(
            found,
            tokenizer,
            name=options.select,
            title=", ".join(told),
            prompt=f"{start} → " if self._translates else start,
            prompt_tokens=() if self._translates else rows[0],
        )
        texts = {}
        for node in described["nodes"]:
            texts[node["id"]] = texts.get(node["parent"], "") + node["text"]
        children: dict[int, set[int]] = {}
        for node in found.nodes():
            children.setdefault(node.parent, set()).add(node.token)

        def describe_nodes(nodes: Sequence[int]) -> list[dict[str, Any]]:
            panels = []
            for start in range(0, len(nodes), NODES):
                some = nodes[start : start + NODES]
                with meshes.on_mesh_of(self.params):
                    pairs = tree.node_logits(*given_model, found, some, select=select)
                for node, logits, left in zip(some, *pairs, strict=True):
                    title = f"{node}: {texts[node]}"
                    panels.append(tree.describe_distribution(tokenizer, logits, left, children[node], title=title))
            return panels

        return TextTree(found, described, self.name, describe_nodes)

    @_on_its_mesh
    def translate(
        self,
        sentences: str | Sequence[str],
        *,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        max_new_tokens: int = 64,
        batch_size: int = translation.BATCH,
        prefix: str | None = None,
        suffix: str | None = None,
        allow_unknown: bool = False,
    ) -> str | list[str]:
        """Translate a sentence, or each of several, greedily or by beam search.

        Args:
            sentences: one gives a string, a list a list.
            num_beams: 1 is greedy decoding.
            length_penalty: beams are ranked by log p / length**length_penalty.
            max_new_tokens: the most tokens of a translation.
            batch_size: sentences that are translated together.
            prefix, suffix: text before and after each sentence; by default what `config.json` says, and a line break
                after a sentence for a decoder-only model.
            allow_unknown: read a word that is not in the tokenizer's vocabulary as the unknown token.

        Raises:
            ValueError: as `translation.translate` does.
        """
        self._require_tokenizer()
        found = translation.translate(
            self.loaded,
            [sentences] if isinstance(sentences, str) or not hasattr(sentences, "__iter__") else sentences,
            form=translation.Form.of(self.loaded, prefix=prefix, suffix=suffix),
            num_beams=num_beams,
            length_penalty=length_penalty,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            allow_unknown=allow_unknown,
        )
        return found[0] if isinstance(sentences, str) else found

    # Scoring ----------------------------------------------------------------------------------------------------------

    @_on_its_mesh
    def log_probs(
        self, texts: Prompts, completions: Prompts | None = None, *, batch_size: int = 16
    ) -> Float[np.ndarray, "time"] | list[Float[np.ndarray, "time"]]:
        """Return the log-probability of each token of a text given those before it, in nats.

        Args:
            texts: one gives an array, several give a list of arrays. The first token of a text is not scored, for
                nothing precedes it (it is by a model with a root state, as `TabularLM`).
            completions: then `texts` are the prompts before them (of an encoder-decoder the sources), and the values
                are those of the completions' tokens. One prompt may have several completions. A completion is encoded
                by itself, without an EOS token that the tokenizer does not add.
            batch_size: texts of one forward pass. The values do not depend on it, up to rounding.

        Raises:
            TypeError: for texts of another type.
            ValueError: if a text leaves nothing to score, or does not fit the context.
        """
        _, prompts = self._encoded(texts, name="texts")
        if completions is None:
            if self._translates:
                raise ValueError("an encoder-decoder scores completions given texts: give both.")
            least = self.model.min_prompt_length
            for index, row in enumerate(prompts):
                if len(row) <= least:
                    raise ValueError(f"text {index} has too few tokens ({len(row)}): there is nothing to score.")
            scored, prompts = [row[least:] for row in prompts], [row[:least] for row in prompts]
        else:
            scored = [self._completion_ids(each, i) for i, each in enumerate(_listed(completions, "completions"))]
            prompts = prompts * len(scored) if len(prompts) == 1 else prompts
        found = self._scored(prompts, scored, batch_size)
        return found[0] if _is_single(texts) and (completions is None or _is_single(completions)) else found

    def perplexity(
        self, texts: Prompts, completions: Prompts | None = None, *, batch_size: int = 16
    ) -> float | list[float]:
        """Return exp(−mean log p) over the scored tokens of a text, or of each of several; see `log_probs`."""
        found = self.log_probs(texts, completions, batch_size=batch_size)
        if isinstance(found, list):
            return [math.exp(-each.mean()) for each in found]
        return math.exp(-found.mean())

    @_on_its_mesh
    def alternatives(
        self, prompt: Prompt, completion: Completion | Prompt, *, k: int = 5
    ) -> list[list[tuple[str | int, float]]]:
        """Return, for each token of a completion, the k most probable tokens there, best first.

            lm.alternatives("And the king", lm.generate("And the king")[0])

        Args:
            prompt: what stands before the completion; of one with `heal`, its last tokens are taken back here too.
            completion: what `generate` returned, a text or token ids.
            k: tokens at each place.

        Returns:
            (token, log-probability in nats) under the model at temperature 1; a token as text, or without a tokenizer
            as its id.

        Raises:
            TypeError: for another completion, such as a list of them.
            ValueError: if k is not in the range of the vocabulary, or as `log_probs`.
        """
        Range(1, self.model.vocab_size).check("k", k, integer=True)
        if self._translates:
            raise ValueError("alternatives are of decoder-only models.")
        given = completion.tokens if isinstance(completion, Completion) else completion
        ids = hasattr(given, "__iter__") and all(isinstance(each, int | np.integer) for each in given)
        if not isinstance(given, str) and not ids:
            raise TypeError(f"completion must be a Completion, a text or token ids, but is {given!r:.60}.")
        row, healed = self._ids(prompt, "prompt", chat=False), 0
        if isinstance(completion, Completion):
            healed = int(completion.details.get("healed", 0))
        prompts, completions = [row[: len(row) - healed]], [self._completion_ids(given, 0)]
        length = min(
            -(-(len(prompts[0]) + len(completions[0])) // SCORED_BUCKET) * SCORED_BUCKET, self.model.max_length
        )
        rows = scoring.pad_completions(prompts, completions, length=length)
        scoring.check_sequences(self.model, rows)
        found = _top(self.model, self.params, on_device(rows), k=k)
        tokens, logp = (np.asarray(each)[rows.completion_mask] for each in found)
        names = tokens.reshape(-1).tolist()
        names = names if self.tokenizer is None else text.token_texts(self.tokenizer, names)
        names = np.asarray(names, object).reshape(tokens.shape)
        return [list(zip(*each, strict=True)) for each in zip(names.tolist(), logp.tolist(), strict=True)]

    # Analysis ---------------------------------------------------------------------------------------------------------

    @_on_its_mesh
    def attention(self, source: str, *, kind: attention.Kind | None = None, target: str | None = None) -> TextAttention:
        """Compute the attention maps of a text, `lm.attention("twenty-one").plot(layer=1, head=3)`.

        Args:
            source: the text; of an encoder-decoder, what it translates.
            kind: of an encoder-decoder "cross" (the default), "encoder" or "decoder"; else "self".
            target: an encoder-decoder's output; by default its greedy translation.

        Raises:
            ValueError: as `analysis.attention.attention_maps` does.
        """
        self._require_tokenizer()
        return TextAttention(attention.attention_maps(self.loaded, source, kind=kind, target=target), self.name)

    @_on_its_mesh
    def landscape(
        self,
        texts: Prompts,
        *,
        directions: Literal["parameter", "filter", "none", "hessian"] = "parameter",
        points: int = 21,
        radius: float = 1.0,
        seed: int = 0,
        iterations: int | None = None,
        vectors: int | None = None,
        memory_budget: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> TextLandscape:
        """Compute the next-token loss of a text, or of several, over a plane of two orthogonal directions.

        Args:
            texts: the texts whose mean loss it is, in nats per token.
            directions: random ones, scaled to each tensor's norm, filter by filter or not at all; or "hessian", the
                eigenvectors of the two largest Hessian eigenvalues.
            points: along each direction; of an odd number the middle one is the model itself.
            radius: the grid reaches from −radius to radius, in lengths of the directions.
            seed: of the random directions, and of the first Lanczos vector.
            iterations: for "hessian", the most Lanczos iterations; 40 if not given.
            vectors: for "hessian", Lanczos vectors that are held at once, each as large as the model; by default all.
            memory_budget, checkpoint, progress: as in `analysis.landscape.loss_surface`.

        Raises:
            ValueError: as `analysis.landscape.surface_of` does.
        """
        known = ("parameter", "filter", "none", "hessian")
        if directions not in known:
            raise ValueError(f"directions must be one of {', '.join(known)}, but is {directions!r}.")
        if points < 2:
            raise ValueError(f"points must be at least 2, but is {points}.")
        axis = landscape.axis(radius, points)
        if self._translates:
            raise ValueError("landscape needs a model of one text: an encoder-decoder has no next-token loss of one.")
        given, rows = self._encoded(texts, name="texts")
        tokens, mask = text.right_pad(rows)
        loss = landscape.next_token_loss(self.model, tokens, None if mask.all() else mask)
        for name, value in (("iterations", iterations), ("vectors", vectors)):
            if value is not None and directions != "hessian":
                raise ValueError(f'{name} is for directions="hessian".')
        lanczos = {"vectors": vectors, "progress": progress}
        lanczos |= {} if iterations is None else {"max_iterations": iterations}
        plane, of_hessian = self._plane(loss, directions, jax.random.key(seed), **lanczos)
        one = given[0] if len(given) == 1 and isinstance(given[0], str) else None
        surface = landscape.surface_of(
            loss,
            self.params,
            plane,
            axis,
            axis,
            title=f"Loss of {len(rows)} texts" if one is None else f"Loss of “{one}”",
            **of_hessian,
            memory_budget=memory_budget,
            checkpoint=checkpoint,
            progress=progress,
        )
        return TextLandscape(surface, self.name)

    # Text and files ---------------------------------------------------------------------------------------------------

    def encode(self, texts: str | Sequence[str]) -> list[int] | list[list[int]]:
        """Return the token ids of a string, or of each of several; an empty one is the BOS token."""
        if isinstance(texts, str) or not hasattr(texts, "__iter__"):
            return text.encode(self._require_tokenizer(), texts)
        return [text.encode(self._require_tokenizer(), each) for each in texts]

    def decode(self, tokens: Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
        """Return the text of a list of token ids, or of each of several, without special tokens.

        Raises:
            TypeError: for tokens of another type.
            ValueError: for an id that is not in the model's vocabulary.
        """
        if hasattr(tokens, "__len__") and not len(tokens):
            return ""
        rows = _listed(tokens, "tokens")
        for row in rows:
            if isinstance(row, str):
                raise TypeError(f"tokens must be token ids, but are {row!r}.")
            if row and not 0 <= min(row) <= max(row) < self.model.vocab_size:
                raise ValueError(
                    f"tokens must lie in [0, {self.model.vocab_size}), the model's vocabulary, "
                    f"but range from {min(row)} to {max(row)}."
                )
        found = [self._text(row) for row in rows]
        return found[0] if _is_single(tokens) else found

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model to a folder that `jl.load` and transformers load: configuration, safetensors, tokenizer."""
        models.save(folder, self.model, self.params, self.tokenizer, config=self.config)

    # ------------------------------------------------------------------------------------------------------------------

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} has no tokenizer files, so that text cannot be turned into tokens: give token ids."
            )
        return self.tokenizer

    @property
    def _translates(self) -> bool:
        return isinstance(self.model, models.T5)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._require_tokenizer().decode(tokens, skip_special_tokens=True)

    def _encoded(
        self, prompts: Prompts, *, chat: InChat = False, name: str = "prompts", sampling: Sampling | None = None
    ) -> tuple[list[Prompt], list[list[int]]]:
        """Each prompt as it was given, and its tokens; cut to fit the context if `sampling` asks for it."""
        given = _listed(prompts, name)
        rows = [self._ids(each, f"{name.removesuffix('s')} {i}", chat=chat) for i, each in enumerate(given)]
        if sampling is None or sampling.cut is None:
            return given, rows
        if self._translates:
            raise ValueError("cut is for decoder-only models.")
        most = self.model.max_length - sampling.max_new_tokens
        if most < 1:
            raise ValueError(
                f"max_new_tokens must leave room for a prompt in the model's context of {self.model.max_length}, "
                f"but is {sampling.max_new_tokens}."
            )
        return given, [row[-most:] if sampling.cut == "left" else row[:most] for row in rows]

    def _ids(self, prompt: Prompt, name: str, *, chat: InChat) -> list[int]:
        conversation = not isinstance(prompt, str) and any(isinstance(each, Mapping) for each in prompt)
        if not isinstance(prompt, str) and not conversation:
            if chat:
                found = "token ids" if len(prompt) else "empty"
                raise ValueError(f"{name} must be a string or a list of messages for a chat, but is {found}.")
            return list(prompt)
        if conversation and not chat:
            raise ValueError(
                f"{name} is a conversation: lm.chat, or chat=True of generate, puts it into the chat template. "
                "lm.tokenizer.apply_chat_template writes it as a text."
            )
        if self._translates:
            if chat:
                raise ValueError("an encoder-decoder has no chat template.")
            form = translation.Form.of(self.loaded)
            return translation.known_tokens(self._require_tokenizer(), prompt, form=form, name=name)
        return text.encode(self._require_tokenizer(), prompt, chat=chat)

    def _completion_ids(self, completion: Prompt, index: int) -> list[int]:
        if not isinstance(completion, str):
            return list(completion)
        if self._translates:
            return translation.known_tokens(self._require_tokenizer(), completion, name=f"completion {index}")
        return text.continuations(self._require_tokenizer(), [completion])[0]

    def _task(self, rows: Sequence[Sequence[int]]) -> Conditional:
        """The model with the prompts; of an encoder-decoder, with the encoded sources."""
        return next(translation.conditionals(self.loaded, rows, batch_size=len(rows)))

    def _read(self, rows: Sequence[Sequence[int]], sampling: Sampling, *, chat: InChat) -> dict[str, Any]:
        """The parts of a request that depend on its prompts: all tokens are read but those that are written again."""

        def shown(row: int, tokens: Sequence[int]) -> str:
            stream = self._stream(rows[row], sampling, chat=chat)
            return stream.push(tokens) + stream.finish()

        if not sampling.heal:
            return {"task": self._task(rows), "shown": shown}
        places = [len(row) - self._healed(row, sampling) for row in rows]
        texts = [
            b"".join(self.token_bytes[token] for token in row[place:]) for row, place in zip(rows, places, strict=True)
        ]
        task = self._task([row[:place] for row, place in zip(rows, places, strict=True)])
        return {"task": task, "shown": shown, "healing": healing.healing(self.token_bytes, texts)}

    @functools.cached_property
    def _beginnings(self) -> frozenset[bytes]:
        return healing.beginnings(self.token_bytes)

    def _healed(self, row: Sequence[int], sampling: Sampling) -> int:
        """The number of a prompt's last tokens that are written again."""
        if not sampling.heal:
            return 0
        if self._translates:
            raise ValueError("heal is for decoder-only models.")
        return healing.taken_back(self._beginnings, self.token_bytes, row, least=self.model.min_prompt_length)

    def _stream(self, row: Sequence[int], sampling: Sampling, *, chat: InChat) -> text.TextStream | None:
        """The text of a completion, which continues that of the prompt; a translation is a text of its own."""
        if self.tokenizer is None:
            return None
        before, unsearched = () if self._translates else row, max(0, (sampling.min_new_tokens or 0) - 1)
        healed = self._healed(row, sampling)
        return text.TextStream(
            self.tokenizer,
            before,
            sampling.stop,
            unsearched=unsearched,
            reply=bool(chat),
            healed=healed,
            pieces=self.token_bytes if healed else (),
            ends=self.eos_ids,
        )

    def _each(self, pieces: Iterator[decoding.Generation]) -> Iterator[decoding.Generation]:
        while True:
            with meshes.on_mesh_of(self.params):  # for this piece alone: what runs between them is the caller's
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _stops(self, sampling: Sampling) -> tuple[list[int], list[str]]:
        """The control tokens among the stop strings, which end a text as EOS does, and the other strings."""
        control = text.control_ids(self._require_tokenizer()) if sampling.stop else {}
        strings = [each for each in sampling.stop if each not in control]
        for each in strings:
            if held := [token for token in control if token in each]:
                raise ValueError(
                    f"stop strings must be text, or one control token alone, but {each!r} holds {held[0]!r}."
                )
        return [control[each] for each in sampling.stop if each in control], strings

    def _request(
        self,
        strategy: Strategy,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        search: Search,
        further: Sequence[Transform],
        *,
        chat: InChat,
    ) -> strategies.Request:
        further = [further] if isinstance(further, Transform) else further
        if not isinstance(further, Sequence) or not all(isinstance(each, Transform) for each in further):
            raise TypeError(f"transforms must be logits transforms (jl.decoding.transforms), but are {further}.")
        if further and strategy == "contrastive":
            raise ValueError("the strategy contrastive does not use transforms.")
        if strategy == "mbr":
            self._require_tokenizer()
        if sampling.ban or sampling.bias:
            control = text.control_ids(self._require_tokenizer())
            for each in (*sampling.ban, *(given.rpartition("=")[0] for given in sampling.bias)):
                if held := [token for token in control if token in each]:
                    raise ValueError(
                        f"ban and bias must be of text, but {each!r} holds the control token {held[0]!r}: "
                        "jl.decoding.transforms.LogitBias takes a number for each token."
                    )
        if strategy == "speculative":
            search = strategies.with_draft(search, self.params)
        if sampling.context == "slide" and self._translates:
            raise ValueError("a context that slides is for decoder-only models.")
        stop_ids, strings = self._stops(sampling)
        ends = [*self.eos_ids, *stop_ids]
        own = sampling if search.no_repeat_in == "sequence" else dataclasses.replace(sampling, no_repeat_ngram=None)
        warps = [*strategies.transforms_of(own, ends, lambda: self.token_bytes), *further]
        return strategies.Request(
            sampling=sampling,
            search=search,
            eos_ids=ends,
            **self._read(rows, sampling, chat=chat),
            transform=Chain(tuple(warps)) if warps else None,
            stop=decoding.stop_strings(self.token_bytes, strings) if strings else None,
            guidance=self._guidance(sampling, len(rows), chat=chat),
        )

    def _guidance(self, sampling: Sampling, rows: int, *, chat: InChat) -> decoding.Guidance | None:
        if sampling.guidance_prompt is None:
            return None
        if self._translates:
            raise ValueError("guidance_prompt is for decoder-only models.")
        row = self._ids(sampling.guidance_prompt, "guidance_prompt", chat=chat)
        tokens, mask = text.left_pad([row] * rows)
        return decoding.Guidance(tokens, sampling.guidance_scale, mask)

    def _completion(
        self,
        hypothesis: strategies.Hypothesis,
        prompt: Prompt,
        index: int,
        request: strategies.Request,
        stream: text.TextStream | None,
    ) -> Completion:
        tokens, written = hypothesis.tokens, None
        reason = "stop" if tokens[-1] in request.eos_ids else "length"
        if stream is not None:
            written = stream.push(tokens) + stream.finish()
            reason = "stop" if stream.stopped else reason
        return Completion(
            text=written,
            tokens=tokens,
            logp=hypothesis.logp,
            log_prob=hypothesis.log_prob,
            finish_reason="eos" if tokens[-1] in self.eos_ids else reason,
            prompt=prompt,
            index=index,
            details=hypothesis.details | ({"healed": float(stream.healed)} if stream and stream.healed else {}),
        )

    def _scored(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int
    ) -> list[Float[np.ndarray, "time"]]:
        if not self._translates:
            return scoring.completion_log_probs(self.model, self.params, prompts, completions, batch_size=batch_size)
        start = self.model.decoder_prompts(1).tolist()
        rows = scoring.pad_completions(start * len(prompts), completions, multiple=translation.SOURCE_BUCKET)
        tasks = translation.conditionals(self.loaded, prompts, batch_size=batch_size)
        found = []
        for task, places in zip(tasks, _parts(list(range(len(prompts))), batch_size), strict=True):
            part = scoring.Sequences(*(leaf[places] for leaf in rows))
            scoring.check_sequences(task.lm, part)
            values = np.asarray(scoring.compiled_log_probs(task.lm, task.params, on_device(part)))
            found += [row[mask] for row, mask in zip(values, part.completion_mask, strict=True)]
        return found[: len(prompts)]

    def _plane(
        self, loss: Callable[[Params], Array], directions: str, key: Array, **lanczos: Any
    ) -> tuple[tuple[Params, Params], dict[str, Any]]:
        """Two directions, and what is known of the Hessian where they are its eigenvectors."""
        if directions != "hessian":
            return landscape.random_directions(self.params, key, scale=directions), {}
        top = landscape.top_eigenpairs(loss, self.params, key, **lanczos)
        length = landscape.norm(self.params)
        first, second = (landscape.rescaled(vector, length) for vector in top.vectors)
        residuals = None if top.converged.all() else tuple(map(float, top.residuals))
        return (first, second), {"sharpness": float(top.values[0]), "residuals": residuals}


@takes()
def load(
    path_or_name: str | os.PathLike[str],
    *,
    dtype: Any = None,
    mesh: str | Mesh | None = None,
    attention: Form = "exact",
) -> LM:
    """Load a language model with its tokenizer, as an `LM` with methods on text.

        lm = jl.load("tiny-gpt2")
        lm.generate("I have a dream", max_new_tokens=20, temperature=0.8)

    Args:
        path_or_name: a folder in Hugging Face format (safetensors); a `.gguf` file; an embedded model such as
            "tiny-gpt2" or "tiny-t5"; "smollm2-135m-instruct" or "gemma-3-270m", from Python packages (the error that
            says they are not installed names them); or the name of a repository on the Hugging Face hub, which is
            downloaded once. docs/models.md lists the families.
        dtype: type of the parameters, such as "bfloat16"; float32 by default.
        mesh: devices that share the work, as sizes of "data", "fsdp" and "model" such as "data=4,fsdp=2" or "data=-1"
            for all (`jaxrl_llm.mesh.mesh_of`), or a mesh of these axes. Rows of prompts and texts are then split over
            data × fsdp, the parameters over fsdp × model. By default one device works. In float32 the tokens and values
            are those of one device, up to rounding.
        attention: its form. "exact" computes all scores, of long texts a part at a time. "cudnn" is NVIDIA's fused
            kernel: for reading prompts and texts, with `dtype` "bfloat16" or "float16", on GPUs of compute capability
            8.0 or above. Steps of one token, attention maps and loss landscapes stay exact; trainers have this option
            too. docs/speed.md says which models can have it.

    Returns:
        The model, with `.model` (a pure function), `.params` (a tree of arrays), `.tokenizer` (None without its files),
        `.config`, and methods such as `generate`, `chat`, `log_probs`, `attention` and `save`.

    Raises:
        FileNotFoundError: if the path or name does not exist, or has no safetensors. Pickled weights are never loaded.
        ValueError: if a file is damaged, its tensors do not fit its configuration, the architecture is unknown, or
            it is a reward model (`jl.train.RewardModel.load`); for a mesh that the devices do not fill; or for a form
            of attention that the model, the device or `dtype` cannot have.
    """
    loaded = models.load(path_or_name, dtype=dtype, sharding=meshes.sharding_of(mesh), attention=attention)
    if is_reward(loaded.config):
        raise ValueError(f"{path_or_name} is a reward model: load it with jl.train.RewardModel.load.")
    name = os.fspath(path_or_name)
    return LM(loaded, name, path=name)


def _is_single(prompts: Prompts) -> bool:
    """Return whether this is one string, one list of token ids or one conversation."""
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    return isinstance(prompts, str) or all(isinstance(each, numbers.Integral | Mapping) for each in prompts)


def _listed(prompts: Prompts, name: str) -> list[Prompt]:
    """Return the prompts as a list of strings, lists of token ids and conversations."""
    expected = f"{name} must be a string, a list of strings or lists of token ids, but is"
    if isinstance(prompts, str):
        return [prompts]
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise TypeError(f"{expected} {prompts!r}.")
    if not prompts:
        raise ValueError(f"{expected} empty.")
    if _is_single(prompts):
        return [list(prompts)]
    rows = [each.tolist() if hasattr(each, "tolist") else each for each in prompts]
    for row in rows:
        if not isinstance(row, str) and not (isinstance(row, list | tuple) and _is_single(row)):
            raise TypeError(f"{expected} a list that holds {row!r}.")
    return rows


def _parts(rows: list[Any], batch_size: int) -> list[list[Any]]:
    """Return rows in batches of one size; the last is filled up with the last row."""
    options_of.COMPLETIONS.check("batch_size", batch_size, integer=True)
    size = meshes.filled(min(batch_size, len(rows)))
    whole = rows + rows[-1:] * (-len(rows) % size)
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _short(content: Any) -> str:
    whole = repr(content)
    return whole if len(whole) <= SHOWN else f"{whole[: SHOWN - 2]}…{whole[-1]}"


def _rounded(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)

"""`jaxrl-llm attention`: what each token looks at, drawn and in numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxrl_llm.cli.prompts import require_tokenizer


@dataclasses.dataclass(frozen=True)
class Attention:
    """Draw the attention maps of a text: which tokens each token looks at, in any layer and head."""

    text: tyro.conf.Positional[str]
    """The text; of an encoder-decoder, what it translates."""
    model: str = "tiny-t5"
    """As in `generate`, or a T5."""
    kind: Literal["cross", "encoder", "decoder", "self"] | None = None
    """Of a T5 cross (the default), encoder or decoder; of other models self."""
    layer: int | None = None
    """Counted from 0, or from −1 backwards; all if not given."""
    head: int | None = None
    """Likewise."""
    target: str | None = None
    """A T5's output; by default what it translates greedily."""
    links: int = 20
    """Print the strongest link of so many tokens, those with the most weight; of several heads, in their mean."""
    out: Path = Path("attention.png")
    """Where to draw it; the suffix decides the format (.png, .svg, .pdf)."""

    def run(self) -> None:
        """Compute the maps, draw them, print entropy and the strongest links."""
        from jaxrl_llm import models
        from jaxrl_llm.analysis import attention
        from jaxrl_llm.plots import style
        from jaxrl_llm.plots.attention import attention_figure

        if self.links < 0:
            raise ValueError(f"--links must be 0 or above, but is {self.links}.")
        loaded = models.load(self.model)
        require_tokenizer(loaded, self.model)
        maps = attention.attention_maps(loaded, self.text, kind=self.kind, target=self.target)
        layers = _chosen("--layer", self.layer, maps.weights.shape[0])
        heads = _chosen("--head", self.head, maps.weights.shape[1])
        style.save_as(attention_figure(maps, layer=self.layer, head=self.head, model=self.model), self.out)
        print(f"{self.model}, {maps.name}: {maps.source}" + (f" → {maps.target}" if maps.target else ""))
        _print_entropies(maps, layers, heads)
        count = len(layers) * len(heads)
        where = f"mean of {count} heads" if count > 1 else f"layer {layers[0]}, head {heads[0]}"
        _print_links(attention.strongest_links(maps, layers=layers, heads=heads), maps, self.links, where)
        print(f"drawn: {self.out}")


def _chosen(option: str, index: int | None, count: int) -> list[int]:
    """One of them, or all."""
    if index is None:
        return list(range(count))
    if not -count <= index < count:
        raise ValueError(f"{option} must be from 0 to {count - 1} (or −{count} to −1), but is {index}.")
    return [index % count]


def _print_entropies(maps: Any, layers: list[int], heads: list[int]) -> None:
    from jaxrl_llm.analysis import attention

    entropies = attention.entropy(maps.weights).mean(axis=-1)
    print("entropy (nats), mean over the queries:")
    for layer in layers:
        each = "  ".join(f"{entropies[layer, head]:.3f}" for head in heads)
        print(f"  layer {layer}: {entropies[layer, heads].mean():.3f}   heads {each}")


def _print_links(links: list[Any], maps: Any, limit: int, where: str) -> None:
    """The strongest, in the order of the text."""
    kept = sorted(links, key=lambda link: -link.weight)[:limit]
    rows = [(maps.queries[link.query], maps.keys[link.key], link) for link in sorted(kept)]
    if not rows:
        return
    print("strongest links:")
    shown = [(_visible(query), _visible(key), link) for query, key, link in rows]
    wide = [max(len(row[side]) for row in shown) for side in (0, 1)]
    for query, key, link in shown:
        print(f"  {query:{wide[0]}} → {key:{wide[1]}}  {link.weight:.3f}  {where}")


def _visible(token: str) -> str:
    """A token on one line, in quotes where it would not be seen as it is."""
    return token if token.isprintable() and token == token.strip() != "" else repr(token)

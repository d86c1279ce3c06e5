"""`jaxrl-llm landscape`: the loss of a text around a model, drawn."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from jaxrl_llm.cli.prompts import require_tokenizer


@dataclasses.dataclass(frozen=True)
class Landscape:
    """Draw the loss of a text around a model, over a plane of two orthogonal directions."""

    text: tyro.conf.Positional[str]
    """The text whose loss it is: next-token loss, in nats per token."""
    model: str = "tiny-gpt2"
    """As in `generate`."""
    directions: Literal["parameter", "filter", "none", "hessian"] = "parameter"
    """Random, scaled to each tensor's norm, filter by filter or not at all; or the top two Hessian eigenvectors."""
    points: int = 21
    """Along each direction; of an odd number the middle one is the model itself."""
    radius: float = 1.0
    """The grid reaches from -radius to radius, in lengths of the directions."""
    seed: int = 0
    """Of the directions."""
    iterations: int = 40
    """For --directions hessian: the most Lanczos iterations; each holds one copy of the parameters."""
    memory_budget: int | None = None
    """Bytes for the points that are evaluated together; by default one at a time on a CPU."""
    checkpoint: Path | None = None
    """A file that keeps what is done, so that the same command goes on after an interruption."""
    out: Path = Path("landscape.png")
    """Where to draw it; the suffix decides the format (.png, .svg, .pdf)."""
    html: Path | None = None
    """Also write one self-contained page with the surface to be turned by hand (needs the extra `interactive`)."""

    def run(self) -> None:
        """Compute the surface, draw it, print its numbers."""
        import jax.numpy as jnp

        from jaxrl_llm import models, text
        from jaxrl_llm.analysis import landscape
        from jaxrl_llm.plots import interactive, style
        from jaxrl_llm.plots.landscape import landscape_figure

        axis = landscape.axis(self.radius, self.points)
        if self.points < 2:
            raise ValueError(f"--points must be at least 2, but is {self.points}.")
        style.check_suffix(self.out)
        if self.html is not None:
            interactive.require_plotly()
        loaded = models.load(self.model)
        tokens = text.encode(require_tokenizer(loaded, self.model), self.text)
        loss_fn = landscape.next_token_loss(loaded.model, jnp.asarray([tokens]))
        directions, sharpness = self._directions(loss_fn, loaded.params)
        surface = self._surface(loss_fn, loaded.params, directions, axis, sharpness)
        style.save_as(landscape_figure(surface, model=self.model), self.out)
        self._print(surface.as_dict())
        print(f"drawn: {self.out}")
        if self.html is not None:
            page = interactive.surface_html([surface], title=surface.title)
            style.write_atomically(self.html, page.encode())
            print(f"to be turned by hand: {self.html}")

    def _directions(self, loss_fn: Any, params: Any) -> tuple[tuple[Any, Any], float | None]:
        """The two directions, and the sharpness where it comes with them."""
        import jax

        from jaxrl_llm.analysis import landscape

        key = jax.random.key(self.seed)
        if self.directions != "hessian":
            return landscape.random_directions(params, key, scale=self.directions), None
        top = landscape.top_eigenpairs(loss_fn, params, key, max_iterations=self.iterations, progress=True)
        length = landscape.norm(params)
        return tuple(landscape.rescaled(vector, length) for vector in top.vectors), float(top.values[0])

    def _surface(
        self, loss_fn: Any, params: Any, directions: tuple[Any, Any], axis: Any, sharpness: float | None
    ) -> Any:
        """The surface; holes are reported with the other numbers, and an interruption with what goes on."""
        import warnings

        from jaxrl_llm.analysis import landscape

        options = {"memory_budget": self.memory_budget, "checkpoint": self.checkpoint, "sharpness": sharpness}
        options["title"] = f"Loss of “{self.text}”"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", landscape.LossHole)
                return landscape.surface_of(loss_fn, params, directions, axis, axis, **options)
        except KeyboardInterrupt:
            if self.checkpoint is not None:
                print(f"the rows that are done are in {self.checkpoint}: the same command goes on.", file=sys.stderr)
            raise

    def _print(self, surface: dict[str, Any]) -> None:
        where = "" if surface["centre_on_grid"] else ", not on the grid"
        print(f"centre {surface['centre']:.4f} nats per token{where}")
        print(f"minimum {surface['minimum']:.4f}, maximum {surface['maximum']:.4f}")
        print(f"cosine of the directions {surface['cosine']:.1e}")
        if "sharpness" in surface:
            print(f"sharpness (largest Hessian eigenvalue) {surface['sharpness']:.4g}")
        if surface["holes"]:
            print(f"no finite loss at {surface['holes']} of {self.points**2} points")

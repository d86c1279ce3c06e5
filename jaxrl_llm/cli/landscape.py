"""`jaxrl-llm landscape`: the loss of a text around a model, drawn."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class Landscape:
    """Draw the loss of a text around a model, over a plane of two orthogonal directions."""

    text: tyro.conf.Positional[str]
    """The text; its next-token loss is drawn, in nats per token."""
    model: str = "tiny-gpt2"
    """As in `generate`."""
    directions: Literal["parameter", "filter", "none", "hessian"] = "parameter"
    """Random, scaled to each tensor's norm, filter by filter or not at all; or the top two Hessian eigenvectors."""
    points: int = 21
    """Points along each direction; of an odd number the middle one is the model itself."""
    radius: float = 1.0
    """The grid reaches from -radius to radius, in lengths of the directions."""
    seed: int = 0
    """Random seed of the directions."""
    iterations: int | None = None
    """The most Lanczos iterations, for --directions hessian; 40 if not given."""
    vectors: int | None = None
    """Lanczos vectors that are held at once, for --directions hessian, each as large as the model; by default one for
    each iteration. Fewer take less memory and more iterations."""
    memory_budget: int | None = None
    """Bytes for the points that are evaluated together; by default one point at a time on a CPU."""
    checkpoint: Path | None = None
    """A file that keeps finished rows, so that the same command continues after an interruption."""
    out: Path = Path("landscape.png")
    """The file of the figure; its suffix decides the format (.png, .svg, .pdf). A missing folder is
    made."""
    html: Path | None = None
    """Also write a self-contained page with an interactive 3-D plot (needs the extra `interactive`)."""

    def run(self) -> None:
        """Compute the surface, draw it, print its numbers."""
        import jaxrl_llm as jl
        from jaxrl_llm.plots import interactive, style

        style.check_suffix(self.out)
        if self.html is not None:
            interactive.require_plotly()
        found = self._landscape(jl.load(self.model))
        style.save_as(found.plot(), self.out)
        if self.html is not None:
            style.write_atomically(self.html, found.html().encode())
        self._print(found.surface.as_dict())
        print(f"drawn: {self.out}")
        if self.html is not None:
            print(f"interactive 3-D plot: {self.html}")

    def _landscape(self, lm: Any) -> Any:
        """Compute it; holes are reported with the other numbers, and an interruption with how to resume."""
        from jaxrl_llm.analysis.landscape import LossHole

        names = ("directions", "points", "radius", "seed", "iterations", "vectors", "memory_budget", "checkpoint")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LossHole)
                return lm.landscape(self.text, **{name: getattr(self, name) for name in names})
        except KeyboardInterrupt:
            if self.checkpoint is not None:
                print(f"finished rows are in {self.checkpoint}: the same command continues.", file=sys.stderr)
            raise

    def _print(self, surface: dict[str, Any]) -> None:
        where = "" if surface["centre_on_grid"] else ", not on the grid"
        print(f"centre {surface['centre']:.4f} nats per token{where}")
        print(f"minimum {surface['minimum']:.4f}, maximum {surface['maximum']:.4f}")
        print(f"cosine of the directions {surface['cosine']:.1e}")
        if "sharpness" in surface:
            print(f"sharpness (largest Hessian eigenvalue) {surface['sharpness']:.4g}")
        if "residuals" in surface:
            first, second = surface["residuals"]
            print(
                f"not converged: the residuals of the two eigenvectors are {first:.2g} and {second:.2g}; give more "
                "--iterations"
            )
        if surface["holes"]:
            print(f"no finite loss at {surface['holes']} of {self.points**2} points")

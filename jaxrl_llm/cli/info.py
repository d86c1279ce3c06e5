"""`jaxrl-llm info`: versions, devices, caches and models, for a report or a look."""

from __future__ import annotations

import collections
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import jaxrl_llm

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "safetensors")
EXTRAS = {
    "grammar": "llguidance",
    "interactive": "plotly",
    "parquet": "pyarrow",
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
}


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions, devices, caches and the models that need no download."""

    def run(self) -> None:
        """Print one fact a line."""
        import jax

        from jaxrl_llm import runtime
        from jaxrl_llm.models import loading

        devices = jax.devices()
        kinds = collections.Counter(device.device_kind for device in devices)
        cached = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        facts = {
            "jaxrl_llm": f"{jaxrl_llm.__version__} ({Path(jaxrl_llm.__file__).parent})",
            "python": f"{platform.python_version()} on {platform.platform()}",
            **{name: importlib.metadata.version(name) for name in SHOWN},
            "extras": ", ".join(name for name, module in EXTRAS.items() if importlib.util.find_spec(module)) or "none",
            "devices": ", ".join(f"{count} × {kind}" for kind, count in kinds.items()) + f" ({jax.default_backend()})",
            "processors": str(os.cpu_count()),
            "cache": str(runtime.cache()),
            "compiled programs": f"{cached}, {_size(cached)}",
            "embedded models": ", ".join(filter(loading.is_embedded, loading.EMBEDDED)),
            "models in packages": ", ".join(
                f"{name} ({'installed' if loading.is_installed(name) else each.requirements[0] + ' is not installed'})"
                for name, each in loading.PACKAGED.items()
            ),
        }
        for name, fact in facts.items():
            print(f"{name:<20}{fact}")


def _size(folder: Path) -> str:
    files = [each.stat().st_size for each in folder.glob("*") if each.is_file()] if folder.is_dir() else []
    return f"{len(files)} files, {sum(files) / 2**20:.0f} MiB"

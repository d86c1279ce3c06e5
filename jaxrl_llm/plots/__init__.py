"""Drawing functions: data in, matplotlib figures out. Nothing here imports jax."""

import logging

from jaxrl_llm import submodules

# "Matplotlib is building the font cache" is said once per machine, and concerns nobody who asked for a picture.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

__getattr__, __dir__ = submodules(__name__)

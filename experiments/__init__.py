"""Experiments: each computes what one figure shows and writes it to `results/<name>.json`.

`python -m experiments.<name>` imports this first, so that the compilation cache is chosen before JAX starts.
"""

from jaxrl_llm import runtime

runtime.set_up()

"""Benchmarks: ratios within one run, never asserted in tests."""

import os

from jaxrl_llm import runtime

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its threads do not spin while the other side runs
runtime.set_up()  # before jax

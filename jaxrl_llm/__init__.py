"""Preference alignment, decoding and their visualisation for language models, in JAX: exact first.

Import the floor that you need, for example `from jaxrl_llm import models, decoding`; nothing heavy is imported here.
"""

__version__ = "0.1.0"

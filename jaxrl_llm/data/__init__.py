"""Text that experiments read: public packages fetched by name, and the readers of their formats."""

from jaxrl_llm import submodules

__getattr__, __dir__ = submodules(__name__)

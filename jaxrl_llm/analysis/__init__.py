"""Measurements of language models: reference laws, metrics and what is drawn from them."""

"""Shared by the tests by enumeration."""

import jax
import pytest


@pytest.fixture(scope="module")
def float64():
    """Double precision for a whole module, its fixtures included."""
    with jax.enable_x64(True):
        yield

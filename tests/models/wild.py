"""The goldens as folders of a Hugging Face model, with fields of their configurations and their tensors changed."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxrl_llm import models

GOLDENS = Path(__file__).parents[1] / "goldens"
ABSENT = object()


@functools.cache
def golden(name):
    return models.load(GOLDENS / name)


def variant(folder, name, *, config=None, tensors=None):
    """The golden `name`, written into `folder` with fields of its configuration and its tensors changed."""
    fields = json.loads((GOLDENS / name / "config.json").read_text()) | (config or {})
    fields = {field: value for field, value in fields.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(fields))
    if tensors is None:
        shutil.copy(GOLDENS / name / "model.safetensors", folder)
    else:
        save_file(tensors(load_file(GOLDENS / name / "model.safetensors")), folder / "model.safetensors")
    return folder


def assert_is_golden(loaded, name):
    """The same function, and the same parameters bit for bit."""
    assert loaded.model == golden(name).model
    jax.tree.map(np.testing.assert_array_equal, loaded.params, golden(name).params)


# Changes of tensors ---------------------------------------------------------------------------------------------------


def without(*names):
    return lambda stored: {name: tensor for name, tensor in stored.items() if name not in names}


def beside(**more):
    """Further tensors: arrays, or functions of the stored ones. A dot in a name is written as two underscores."""
    named = {name.replace("__", "."): value for name, value in more.items()}
    return lambda stored: stored | {name: value(stored) if callable(value) else value for name, value in named.items()}


def copy_of(name, *, off=0.0):
    """A copy of a stored tensor, its first number changed by `off`."""

    def copied(stored):
        tensor = stored[name].copy()
        tensor.flat[0] += off
        return tensor

    return copied

"""The committed results, as the tests of the experiments read them."""

import functools
import json

from experiments import ledger


@functools.cache
def entry(name: str) -> dict:
    """Return a committed results file."""
    return json.loads((ledger.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def number(results: str, name: str) -> dict:
    """Return the one number of a results file whose name begins so."""
    (found,) = [each for each in entry(results)["numbers"] if each["name"].startswith(name)]
    return found

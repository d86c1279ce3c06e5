"""Every committed number lies within its own bound, or its claim says that it does not hold."""

import json

import pytest

from experiments import ledger

FILES = sorted(ledger.RESULTS.glob("*.json"))


def test_there_are_results():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_numbers_lie_within_their_bounds(path):
    entry = json.loads(path.read_text(encoding="utf-8"))
    outside = [number["name"] for number in entry["numbers"] if not ledger.holds(number)]
    assert bool(outside) != entry["holds"], outside
    assert any("tolerance" in number or "interval" in number for number in entry["numbers"]), "nothing can fail"

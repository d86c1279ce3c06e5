"""The numbers that the committed results on reward models, RLHF's terms and losses promise, and how tight they are."""

import json
import math
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "results"

# results file, name of the number, what it must be, and the loosest tolerance it may be given
EXPECTED = [
    ("reward_model", "Δ(1000)", 7.598, 1e-3),
    ("reward_model", "largest gradient of an answer, K = 2", 1.0, 1e-9),
    ("reward_model", "largest gradient of an answer, K = 4", 0.5, 1e-9),
    ("reward_model", "largest gradient of an answer, K = 9", 2 / 9, 1e-9),
    ("reward_model", "Δ* where the label holds with p = 0.73", 0.995, 1e-3),
    ("reward_model", "largest change of the loss under a shift of all scores by up to 1000", 0.0, 1e-9),
    ("reward_model", "r_w + r_l with the centring loss", 0.0, 1e-6),
    ("rlhf_terms", "probability of the best sequence, β = 0, γ = 0", 1.0, 1e-3),
    ("rlhf_terms", "entropy of the policy, β = 0, γ = 0", 0.0, 1e-2),
    *[("rlhf_terms", f"KL(π‖π*) of the optimum found, β = {b}, γ = 0", 0.0, 1e-6) for b in ("0.1", "0.2", "0.5", "1")],
    ("rlhf_terms", "largest |Δ log π| of the optimum found, β = 1, γ = 0", 0.0, 1e-5),
    ("preference_losses", "DPO at βΔ = 0", math.log(2), 1e-9),
    ("preference_losses", "slope of DPO at βΔ = 0", -0.5, 1e-9),
    ("preference_losses", "slope of cDPO at βΔ = log((1 − ε)/ε)", 0.0, 1e-9),
    ("preference_losses", "slope of IPO at Δ = 1/(2β)", 0.0, 1e-9),
    ("preference_losses", "largest |slope| of the hinge from βΔ = 1 on", 0.0, 1e-9),
    ("preference_losses", "EXO at βΔ = log((1 − ε)/ε)", 0.0, 1e-9),
    ("preference_losses", "largest difference of the two runs' margins", 0.0, 1e-9),
    *[("ppo_clip_surface", f"largest |gradient + A| at ratio 1, {c} clip", 0.0, 0.0) for c in ("symmetric", "dual")],
    ("ppo_clip_surface", "largest loss at A = −1, ratio up to 1000, dual clip", 3.0, 1e-9),
    ("ppo_clip_surface", "smallest |gradient| of CISPO over min(ρ, 5)", 1.0, 1e-9),
]

# a bound on one side, or on both
INTERVALS = [
    ("reward_model", "share of the gap in the margin that is left at the matched rate", (0.0, 0.05)),
    ("reward_model", "share of the gap in the held-out loss that is left at the matched rate", (0.0, 0.05)),
    ("rlhf_terms", "smallest rise of the pretraining loss over β, γ = 0", (1e-3, math.inf)),
    ("rlhf_terms", "largest rise of the pretraining loss over β, γ = 10", (-math.inf, 0.0)),
    ("rlhf_terms", "largest KL of best-of-n − its bound, n = 2 to 1024", (-math.inf, 0.0)),
    ("preference_losses", "change of the chosen log-probability, shared rows", (-math.inf, -1e-3)),
    ("preference_losses", "change of the chosen log-probability, free rows", (1e-3, math.inf)),
]


def number(results: str, name: str) -> dict:
    """The one number of this name."""
    entries = json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))["numbers"]
    (found,) = [entry for entry in entries if entry["name"] == name]
    return found


@pytest.mark.parametrize(("results", "name", "expected", "loosest"), EXPECTED)
def test_number_is_what_theory_says(results, name, expected, loosest):
    entry = number(results, name)
    assert entry["tolerance"] <= loosest
    assert entry["expected"] == pytest.approx(expected, abs=loosest)
    assert entry["value"] == pytest.approx(expected, abs=loosest)


@pytest.mark.parametrize(("results", "name", "within"), INTERVALS)
def test_number_is_bounded_where_the_claim_needs_it(results, name, within):
    entry = number(results, name)
    low, high = entry["interval"]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    assert within[0] <= low <= entry["value"] <= high <= within[1]


def test_gradient_of_ppo_vanishes_exactly_where_the_clip_says():
    entries = json.loads((RESULTS / "ppo_clip_surface.json").read_text(encoding="utf-8"))["numbers"]
    counts = [entry for entry in entries if entry["name"].startswith("ratios where the gradient is 0 and should not")]
    assert len(counts) == 6
    assert all(entry["value"] == entry["expected"] == entry["tolerance"] == 0 for entry in counts)


def test_shuffling_at_the_same_rate_moves_the_margin_by_more_than_its_error():
    entry = number("reward_model", "margin, shuffled − grouped")
    assert entry["value"] > entry["interval"][0] > 0


@pytest.mark.parametrize("results", ["reward_model", "rlhf_terms", "preference_losses", "ppo_clip_surface"])
def test_claim_holds(results):
    assert json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))["holds"]

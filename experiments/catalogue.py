"""All experiments, by subject: the order of the gallery, and how long each takes at its quick preset."""

from __future__ import annotations

SUBJECTS: dict[str, dict[str, int]] = {
    "Reward models and RLHF": {
        "reward_model": 26,
        "gibbs_optimum": 10,
        "score_function": 14,
        "policy_gradient_variance": 20,
        "ppo_clip_surface": 15,
        "rlhf_terms": 42,
        "exact_alignment": 62,
        "sentiment_alignment": 78,
    },
    "KL divergence": {"kl_estimators": 21, "kl_gradients": 21},
    "DPO and its family": {
        "dpo_equivalence": 16,
        "dpo_gradient": 25,
        "preference_losses": 15,
        "preference_landscape": 32,
    },
    "Sycophancy": {
        "sycophancy": 17,
        "sycophancy_amplification": 63,
        "eos_displacement": 21,
        "sycophancy_intervention": 12,
        "intervention_forgets": 19,
    },
    "Decoding": {"search_trees": 22, "beam_search": 32, "decoding_strategies": 28, "speculative": 39},
    "Models, translation and attention": {"pretrain_gpt2": 10, "train_t5": 9, "translation": 21, "attention_maps": 5},
    "Loss landscapes": {"loss_landscape": 24, "landscape_directions": 36},
}
"""Subject to its experiments, each with the seconds that its quick preset takes on one core, roughly."""


def names() -> list[str]:
    """Return the experiments in the order in which they run: the fast ones first."""
    seconds = {name: taken for experiments in SUBJECTS.values() for name, taken in experiments.items()}
    return sorted(seconds, key=seconds.__getitem__)


def subject(name: str) -> str:
    """Return the subject of a results file, "Other" if it is not listed."""
    experiment = name.split(".", maxsplit=1)[0]
    return next((subject for subject, experiments in SUBJECTS.items() if experiment in experiments), "Other")

"""All experiments, by subject: the order of the gallery, and how long each takes at its quick preset."""

from __future__ import annotations

SUBJECTS: dict[str, dict[str, int]] = {
    "Reward models and RLHF": {
        "reward_model": 20,
        "gibbs_optimum": 8,
        "score_function": 8,
        "policy_gradient_variance": 14,
        "ppo_clip_surface": 16,
        "rlhf_terms": 42,
        "exact_alignment": 30,
        "sentiment_alignment": 35,
    },
    "KL divergence": {
        "kl_estimators": 29,
        "kl_gradients": 23,
    },
    "DPO and its family": {
        "dpo_equivalence": 10,
        "dpo_gradient": 26,
        "preference_losses": 13,
        "preference_landscape": 29,
    },
    "Sycophancy": {
        "sycophancy": 25,
        "sycophancy_amplification": 30,
        "eos_displacement": 20,
        "sycophancy_intervention": 30,
        "intervention_forgets": 20,
    },
    "Decoding": {
        "search_trees": 22,
        "beam_search": 34,
        "decoding_strategies": 28,
        "speculative": 42,
    },
    "Models, translation and attention": {
        "pretrain_gpt2": 9,
        "train_t5": 11,
        "translation": 21,
        "attention_maps": 6,
    },
    "Loss landscapes": {
        "loss_landscape": 23,
        "landscape_directions": 37,
    },
}
"""Subject to its experiments, each with the seconds that its quick preset takes on one core, roughly."""


def names() -> list[str]:
    """Return the experiments in the order in which they run: the fast ones first."""
    seconds = {name: taken for experiments in SUBJECTS.values() for name, taken in experiments.items()}
    return sorted(seconds, key=seconds.__getitem__)


def subject(name: str) -> str:
    """Return the subject of a results file; of one that is not listed, "Other"."""
    experiment = name.split(".", maxsplit=1)[0]
    return next((subject for subject, experiments in SUBJECTS.items() if experiment in experiments), "Other")

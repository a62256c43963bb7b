"""What records look like in TensorBoard (W&B: test_wandb.py)."""

from mmfree_jax.train.sinks import TensorBoard

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
SAMPLE = {"kind": "sample", "step": 20, "prompt": "we", "text": "we\nhold [bold]"}


def test_tensorboard_events(tmp_path):
    sink = TensorBoard(tmp_path, restored_step=0)
    for record in (TRAIN, EVAL, SAMPLE):
        sink.write(record)
    sink.close()
    (events,) = tmp_path.iterdir()
    data = events.read_bytes()
    for tag in (b"train/loss", b"train/zero_share", b"eval/bits_per_byte", b"sample"):
        assert tag in data

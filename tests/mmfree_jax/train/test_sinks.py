"""What records look like in TensorBoard (W&B: test_wandb.py)."""

from run_records import EVAL, TRAIN

from mmfree_jax.train.sinks import TensorBoard

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

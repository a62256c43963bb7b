"""What other programs call our options: `--lr` is answered with --optimizer.learning-rate."""

from collections.abc import Sequence

# Names that are given -> what they may mean here, the likeliest first.
_MEANINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lr rate learning-rate max-lr peak-lr base-lr eta", ("learning-rate",)),
    ("min-lr lr-min", ("min-lr-ratio",)),
    ("lr-schedule scheduler lr-scheduler lr-scheduler-type", ("schedule",)),
    ("warmup warmup-iters warm-up num-warmup-steps", ("warmup-steps",)),
    ("wd decay l2 weight-decay", ("weight-decay",)),
    ("beta1 adam-beta1", ("b1",)),
    ("beta2 adam-beta2", ("b2",)),
    ("epsilon adam-eps adam-epsilon", ("eps",)),
    ("clip grad-clip gradient-clip gradient-clipping max-grad-norm", ("clip-norm",)),
    ("accum grad-accumulation accumulate gradient-accumulation gradient-accumulation-steps",
     ("grad-accum",)),
    ("b bs bsz batch batchsize micro-batch-size per-device-train-batch-size train-batch-size",
     ("batch-size", "batch-sizes", "batch-tokens")),
    ("epoch epochs num-epochs num-train-epochs iters iterations max-iters num-iters max-steps "
     "num-steps n-steps train-steps total-steps", ("steps",)),
    ("seq seqlen seq-length sequence-length sequence-len block-size context context-length "
     "context-size ctx n-ctx max-len max-length max-seq-len", ("seq-len", "max-length", "window")),
    ("tokens num-tokens max-tokens n-tokens n-predict length max-length new-tokens",
     ("max-new-tokens", "tokens")),
    ("temp t", ("temperature",)),
    ("topk k", ("top-k",)),
    ("topp p nucleus", ("top-p",)),
    ("n samples num-return-sequences", ("num-samples", "samples")),
    ("text input-text question", ("prompt",)),
    ("size model model-size model-name arch architecture", ("preset", "sizes")),
    ("model checkpoint checkpoint-path ckpt run run-dir path model-path model-dir weights",
     ("model", "run", "init-from")),
    ("dim width d-model n-embd embed-dim embedding-dim model-dim", ("hidden-size",)),
    ("layers depth n-layer n-layers num-hidden-layers", ("num-layers",)),
    ("heads n-head n-heads num-attention-heads", ("num-heads",)),
    ("ffn ffn-dim d-ff mlp-dim", ("intermediate-size",)),
    ("vocab vocabulary size", ("vocab-size",)),
    ("dtype precision bf16 fp16 half", ("compute-dtype", "dtype")),
    ("gradient-checkpointing checkpointing rematerialize", ("remat",)),
    ("in file files input-file inputs data dataset text", ("input",)),
    ("data dataset dataset-path data-path data-dir train-data corpus", ("data.paths", "data")),
    ("out output o out-dir output-dir outdir save save-dir save-path logdir log-dir run name",
     ("out", "output", "run-dir")),
    ("task benchmark benchmarks", ("tasks",)),
    ("few-shot fewshot shots n-shot", ("num-fewshot",)),
    ("workers num-proc jobs j nproc threads", ("workers", "parallel", "threads")),
    ("np nproc nproc-per-node processes num-processes", ("n", "processes.count")),
    ("gpu gpus num-gpus ngpus devices", ("gpus", "devices", "devices-per-process", "mesh.data")),
    ("dp data-parallel", ("mesh.data",)),
    ("tp tensor-parallel tensor-parallel-size", ("mesh.tensor",)),
    ("sp sequence-parallel", ("mesh.sequence",)),
    ("zero shard fsdp-size", ("mesh.fsdp",)),
    ("eval-every eval-interval eval-steps eval-freq", ("eval.every-steps",)),
    ("save-every save-interval save-steps save-freq", ("checkpoint.every-steps",)),
    ("log-every log-interval logging-steps log-freq", ("log.every-steps",)),
    ("wandb wandb-project project", ("wandb-project",)),
    ("time max-time time-limit minutes", ("max-minutes",)),
    ("random-seed rng", ("seed",)),
    ("force f replace", ("overwrite",)),
    ("q silent", ("quiet",)),
    ("resume resume-from pretrained finetune", ("init-from",)),
)  # fmt: skip


def find_option(given: str, options: Sequence[str]) -> str | None:
    """The option that a name of elsewhere stands for; None if there is none.

    Args:
      given: as it was written, such as "--lr".
      options: those there are, without dashes before them: "optimizer.learning-rate".
    """
    name = given.lstrip("-").replace("_", "-").lower()
    ours = [ours for others, meanings in _MEANINGS if name in others.split() for ours in meanings]
    for wanted in (*ours, name):
        for option in options:
            # A whole name, or the last part of one: learning-rate is optimizer.learning-rate.
            if option == wanted or option.endswith(f".{wanted}"):
                return option
    return None

"""Do the fused program and bfloat16 moments change what is learnt? Losses beside each other.

`python -m experiments.neutrality` prints the table and draws docs/images/neutrality.png from
experiments/results/neutrality/losses.csv. Runs of one seed see the same rows in the same order,
so what is compared is the difference of two runs of one seed, step by step.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np

LOSSES = Path(__file__).parent / "results" / "neutrality" / "losses.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "neutrality.png"
COMPARED = (("fused", "plain"), ("bf16-moments", "fused"))
"""(variant, what it is compared with)."""
_COLOURS = {"plain": "#000000", "fused": "#0072B2", "bf16-moments": "#D55E00"}
_STYLES = ("-", "--")
_SETTLED = 100
"""Steps before this one are left out of the right panel: they differ by up to 0.35 nats."""

Losses = dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]
"""(run, seed, kind) -> steps [n] and losses [n] (nats a token)."""


def read(path: Path = LOSSES) -> Losses:
    """The table's curves, in order of their steps."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = defaultdict(list)
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            key = row["run"], row["seed"], row["kind"]
            found[key].append((int(row["step"]), float(row["loss"])))
    return {k: (np.array([s for s, _ in sorted(v)]), np.array([x for _, x in sorted(v)]))
            for k, v in found.items()}  # fmt: skip


def seeds(losses: Losses) -> list[str]:
    """The seeds of the table, sorted."""
    return sorted({seed for _, seed, _ in losses})


def held_out(losses: Losses, run: str) -> np.ndarray:
    """Last held-out loss of each seed [seeds] (nats a token)."""
    return np.array([losses[run, seed, "eval"][1][-1] for seed in seeds(losses)])


def differences(losses: Losses, a: str, b: str) -> np.ndarray:
    """Last held-out loss of `a` less that of `b`, seed by seed [seeds] (nats a token)."""
    return held_out(losses, a) - held_out(losses, b)


def table(losses: Losses) -> str:
    """Final held-out losses, and the differences with the seeds' spread, as text."""
    names = list(dict.fromkeys(name for pair in COMPARED for name in pair[::-1]))
    lines = ["held-out loss at the end (nats a token)"]
    for name in names:
        values = held_out(losses, name)
        each = "  ".join(f"{v:.4f}" for v in values)
        lines.append(f"  {name:<26}{each}   mean {values.mean():.4f}")
    for a, b in COMPARED:
        gap = differences(losses, a, b)
        each = "  ".join(f"{v:+.4f}" for v in gap)
        lines.append(f"  {f'{a} less {b}':<25}{each}   mean {gap.mean():+.4f}, "
                     f"half range {np.ptp(gap) / 2:.4f}")  # fmt: skip
    return "\n".join(lines)


def draw(losses: Losses, path: Path = PICTURE) -> None:
    """Left: smoothed training losses. Right: differences at equal seed, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from mmfree_jax.train.plot import smooth

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, colour in _COLOURS.items():
        for style, seed in zip(_STYLES, seeds(losses), strict=True):
            steps, loss = losses[name, seed, "train"]
            left.plot(steps, smooth(list(loss), 0.7), style, color=colour, lw=1,
                      label=f"{name}, seed {seed}")  # fmt: skip
            left.plot(*losses[name, seed, "eval"], "o", color=colour, ms=4, mfc="none")
    left.set(xlabel="step", ylabel="loss (nats a token)",
             title="Training loss, smoothed; held-out loss (o)")  # fmt: skip
    left.set_ylim(4.7, 7.5)
    left.legend(frameon=False, fontsize=8)

    right.axhline(0, color="0.6", lw=0.8)
    for a, b in COMPARED:
        curves = []
        for style, seed in zip(_STYLES, seeds(losses), strict=True):
            steps, loss = losses[a, seed, "train"]
            gap = loss - losses[b, seed, "train"][1]
            late = steps >= _SETTLED
            curves.append(gap)
            right.plot(steps[late], gap[late], style, color=_COLOURS[a], lw=0.6, alpha=0.7)
        mean = smooth(list(np.mean(curves, axis=0)), 0.7)
        late = steps >= _SETTLED
        right.plot(steps[late], mean[late], color=_COLOURS[a], lw=2, label=f"{a} less {b}, mean")
        gap = differences(losses, a, b)
        right.plot([steps[-1]] * len(gap), gap, "o", color=_COLOURS[a], ms=5, mfc="none")
    right.set(xlabel="step", ylabel="difference in loss (nats a token)",
              title="Differences at equal seed: each seed thin; held-out (o)")  # fmt: skip
    right.set_ylim(-0.1, 0.1)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Print the table and draw the picture."""
    losses = read()
    print(table(losses))
    draw(losses)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()

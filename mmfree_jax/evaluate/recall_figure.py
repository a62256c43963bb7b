"""The figure of a needle in a haystack: answers by depth and length."""

import io
from collections.abc import Sequence

from mmfree_jax.evaluate.needle import NeedleScore


def needle_png(scores: Sequence[NeedleScore], candidates: int) -> bytes:
    """Two maps, of answers chosen and written: lengths to the right, depths downwards.

    Args:
      scores: of `evaluate_needle`; those without the fact are left out.
      candidates: answers that were compared, for the title.
    """
    from matplotlib.figure import Figure

    lengths = sorted({x.length for x in scores})
    depths = sorted({x.depth for x in scores if x.depth is not None})
    figure = Figure(figsize=(3 + 1.2 * len(lengths), 1.8 + 0.4 * len(depths)), layout="constrained")
    titles = (f"chosen of {candidates}, %", "written, %")
    for k, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), titles, strict=True)):
        found = {(x.depth, x.length): (x.written if k else x.chosen).share for x in scores}
        shares = [[100 * found[depth, length] for length in lengths] for depth in depths]
        axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for row, values in enumerate(shares):
            for column, value in enumerate(values):
                colour = "black" if value > 60 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
        axes.set(title=title, xlabel="context (tokens)")
        if not k:
            axes.set_ylabel("text before the fact")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150, format="png")
    return stream.getvalue()

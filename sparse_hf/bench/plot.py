"""The figures of a benchmark as a picture: time and memory against length, in logarithms."""

from __future__ import annotations

from pathlib import Path

STYLES = {"ours": "-", "window": "--", "dense": ":"}


def plot_attention(result: dict, path: str | Path) -> None:
    """Draw a result of `run_attention`: forward and backward time, and peak memory above what is given."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install 'sparse_hf[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["name"] == name]
        lengths = [row["n"] for row in rows]
        style = {"label": name, "linestyle": STYLES[rows[0]["kind"]], "marker": "o", "markersize": 3}
        left.plot(lengths, [row["step_s"] * 1e3 for row in rows], **style)
        right.plot(lengths, [(row["peak_bytes"] or 0) / 2**20 for row in rows], **style)
    facts = result["environment"]
    shape = f"{result['heads']} heads of {result['head_dim']}, {result['kv_heads']} key heads, {result['dtype']}"
    figure.suptitle(
        f"{result['pattern']}: {shape}, {facts['hardware']}, torch {facts['versions']['torch']}", fontsize=10
    )
    left.set_ylabel("forward + backward, ms")
    right.set_ylabel("peak memory of a step, MiB")
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="tokens")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

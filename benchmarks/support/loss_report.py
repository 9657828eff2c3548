"""Write the results of `benchmarks.loss` as a table, a JSON file and a plot: medians over repeats, with quartiles."""

import json
from pathlib import Path
from typing import Any

from benchmarks.support.step_report import counted


def header() -> str:
    names = f"{'ms':>10} {'quartiles':>20}{'MiB':>9}{'loss error':>12}{'gradient':>16}{'products':>10}{'copies':>8}"
    return f"{'N':>7} {'d':>4} {'loss':<18}{names}  bound by"


def line(row: dict[str, Any]) -> str:
    start = f"{row['images']:>7} {row['width']:>4} {row['name']:<18}"
    if "left_out" in row:
        return f"{start}   left out: {row['left_out']}"
    shares = ""
    if "bound" in row:
        shares = f"{row['share_of_products']:>10.2f}{row['share_of_copies']:>8.2f}  {row['bound']}"
    return f"{start}{_times(row)}{row['memory_bytes'] / 2**20:>9.1f}{_errors(row)}{shares}"


def rank_table(rows: list[dict[str, Any]]) -> str:
    lines = [f"\n{'ranks':>5} {'N':>7} {'d':>4} {'loss':<18}{'ms':>10} {'quartiles':>20}{'MiB':>9}"]
    lines[0] += f"{'loss error':>12}{'gradient':>16}{'tiles':>8}"
    for row in rows:
        start = f"{row['ranks']:>5} {row['images']:>7} {row['width']:>4} {row['name']:<18}"
        if "left_out" in row:
            lines.append(f"{start}   left out: {row['left_out']}")
            continue
        share = f"{row['busiest_share']:.3f}" if row["busiest_share"] is not None else ""
        lines.append(f"{start}{_times(row)}{row['memory_bytes'] / 2**20:>9.1f}{_errors(row)}{share:>8}")
    return "\n".join(lines)


def _errors(row: dict[str, Any]) -> str:
    """Format the errors of loss and gradient, with "of 256" if only 256 rows of the gradient were compared."""
    loss, gradient = (f"{e:.1e}" if e is not None else "none" for e in (row["loss_error"], row["gradient_error"]))
    if 0 < row["gradient_rows"] < 2 * row["images"]:
        gradient += f" of {row['gradient_rows']}"
    return f"{loss:>12}{gradient:>16}"


def _times(row: dict[str, Any]) -> str:
    low, median, high = (1e3 * s for s in row["seconds"])
    return f"{median:>10.1f} {f'{low:.1f} - {high:.1f}':>20}"


def write(results: dict[str, Any], folder: Path) -> None:
    """Write FOLDER/cpu.json and cpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    if any("seconds" in row for row in results["rows"]):
        draw(results, folder / "cpu.png")


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot time and memory against N for each loss, one row of axes per width; dotted is the time of products alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if "seconds" in row]
    widths, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("width", "name"))
    figure, axes = plt.subplots(len(widths), 2, figsize=(11, 0.6 + 4 * len(widths)), squeeze=False)
    for (times, memory), width in zip(axes, widths, strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row["name"] == name and row["width"] == width]
            x, style = [row["images"] for row in own], "-" if name.startswith("ours") else "--"
            colour = plt.get_cmap("tab20")(number)
            times.plot(x, [1e3 * row["seconds"][1] for row in own], style, marker="o", ms=3, label=name, color=colour)
            memory.plot(x, [row["memory_bytes"] / 2**20 for row in own], style, marker="o", ms=3, color=colour)
        own = [row for row in rows if row["name"] == "ours cosine" and row["width"] == width]
        least = [1e3 * row["operations"] / results["product_operations_per_second"] for row in own]
        if own:
            label = "ours cosine, its products alone"
            times.plot([row["images"] for row in own], least, ":", color="0.3", label=label)
        times.set(ylabel=f"ms, forward and backward, d = {width}")
        memory.set(ylabel="MiB above the inputs")
        for axis in (times, memory):
            axis.set(yscale="log", xlabel="N, images of two views")
            axis.set_xscale("log", base=2)
            sizes = sorted({row["images"] for row in rows})
            axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][1].legend(handles, labels, fontsize=7, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    machine = results["machine"]
    figure.suptitle(
        f"Contrastive losses, {counted(machine['threads'], 'thread')} of {machine['processor']}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""Write the results of `benchmarks.step` as a table, a JSON file and a plot: medians over rounds, with quartiles."""

import json
import re
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.support.loops import PARTS

CEILING = "model only"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return (lower quartile, median, upper quartile)."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def shares(run: dict[str, Any], name: str) -> list[float]:
    """Return, for each round, the share of the model-only throughput that a variant reaches."""
    seconds = run["seconds_per_step"]
    return [c / s for c, s in zip(seconds[CEILING], seconds[name], strict=True)]


def median_parts(run: dict[str, Any]) -> dict[str, float]:
    return {part: median(r[part] for r in run["parts_seconds"]) for part in PARTS}


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the table, each as [lower quartile, median, upper quartile]."""
    n = run["global_batch_size"]
    variants = {}
    for name, seconds in run["seconds_per_step"].items():
        variants[name] = {
            "seconds_per_step": spread(seconds),
            "images_per_second": spread([n / s for s in seconds]),
            "views_per_second": spread([2 * n / s for s in seconds]),
            "share_of_model_only": spread(shares(run, name)),
        }
    parts = median_parts(run)
    found = {"variants": variants, "parts_seconds": parts, "parts_sum_seconds": sum(parts.values())}
    return found | {"share_of_peak_rate": share_of_peak(run)}


def share_of_peak(run: dict[str, Any]) -> float | None:
    """Return the model's operations per second, in a complete step with data if measured, as a share of the peak."""
    work, seconds = run["work"], run["seconds_per_step"]
    if work["peak_rate"] is None:
        return None
    return work["model_operations"] / median(seconds.get("data", seconds["synthetic"])) / work["peak_rate"]


def table(results: dict[str, Any]) -> str:
    first = results["runs"][0]
    environment = first["environment"]
    n = first["global_batch_size"]
    lines = [
        "",
        f"{results['settings']['name']}: {n} images, {2 * n} views per step; {environment['precision']} on "
        f"{environment['gpu'] or environment['processor']} ({environment['cores']} cores), torch "
        f"{environment['packages']['torch']}, commit {environment['git_commit']}",
        f"median and quartiles of {first['rounds']} rounds of {first['steps_per_round']} steps each, alternating",
    ]
    for run in results["runs"]:
        numbers, parts = summary(run), median_parts(run)
        ranks, threads = run["ranks"], run["environment"]["threads"]
        lines += [
            "",
            f"{counted(ranks, 'rank')} x {counted(n // ranks, 'image')}, {counted(threads, 'thread')} and "
            f"{counted(run['workers_per_rank'], 'decoding worker')} per rank",
            f"  {'':<12}{'ms/step':>9}{'quartiles':>20}{'images/s':>11}{'views/s':>11}{'of model only':>16}"
            f"{'quartiles':>16}",
        ]
        for name, f in numbers["variants"].items():
            low, middle, high = (1e3 * s for s in f["seconds_per_step"])
            share = f["share_of_model_only"]
            lines.append(
                f"  {name:<12}{middle:>9.1f}{f'{low:.1f} - {high:.1f}':>20}{f['images_per_second'][1]:>11.1f}"
                f"{f['views_per_second'][1]:>11.1f}{share[1]:>16.3f}{f'{share[0]:.3f} - {share[2]:.3f}':>16}"
            )
        name = "data" if "data" in numbers["variants"] else "synthetic"
        total, step = numbers["parts_sum_seconds"], numbers["variants"][name]["seconds_per_step"][1]
        lines.append(f"  parts of a step ({name}) in ms, from a separate instrumented pass:")
        lines.append("    " + "".join(f"{part:>14}" for part in PARTS) + f"{'sum':>10}")
        lines.append("    " + "".join(f"{1e3 * parts[part]:>14.2f}" for part in PARTS) + f"{1e3 * total:>10.1f}")
        lines.append(f"    the sum is {total / step:.3f} of the uninstrumented step above")
        memory = ", ".join(f"{b / 2**20:.0f}" for b in run["peak_memory_bytes"])
        lines.append(f"  peak memory per rank: {memory} MiB ({_memory_of(run)}, of our training alone)")
        lines.append(f"  {_work_of(run)}")
        lines += [f"  {line}" for line in [*run["checks"], *run["notes"]]]
    return "\n".join([*lines, ""])


def _work_of(run: dict[str, Any]) -> str:
    work, share = run["work"], share_of_peak(run)
    text = f"work per rank: {work['model_operations'] / 1e9:.1f} GFLOP in convolutions and products of the model"
    if share is not None:
        text += f", {share:.1%} of the {work['peak_rate'] / 1e12:.0f} TFLOP/s that the GPU's maker states"
    if work["launches"]:
        text += "; " + ", ".join(f"{number:.0f} {kind}" for kind, number in work["launches"].items())
    return text


def _memory_of(run: dict[str, Any]) -> str:
    return "tensors on the GPU" if run["environment"]["gpu"] else "resident set without decoding processes"


def write(results: dict[str, Any], folder: Path) -> None:
    """Write FOLDER/<config name>-<device>.json and .png."""
    path = save(results, folder)
    draw(results, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")


def save(results: dict[str, Any], folder: Path) -> Path:
    """Write only the JSON file, and return its path."""
    environment = results["runs"][0]["environment"]
    device = re.sub(r"\W+", "_", environment["gpu"] or "cpu").strip("_").lower()
    path = folder / f"{results['settings']['name']}-{device}.json"
    folder.mkdir(parents=True, exist_ok=True)
    complete = results | {"runs": [run | {"summary": summary(run)} for run in results["runs"]]}
    path.write_text(json.dumps(complete, indent=1) + "\n")
    return path


def draw(results: dict[str, Any], path: Path) -> None:
    """Plot, for each number of ranks, the parts of a step as a stacked bar, and the complete steps of all variants."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = results["runs"]
    names = {CEILING: "model\nonly", "synthetic": "ours,\nsynthetic", "data": "ours", "plain": "plain\nPyTorch"}
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    figure, axes = plt.subplots(1, len(runs), figsize=(1.5 + 4.5 * len(runs), 4.2), sharey=True, squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        variants = run["seconds_per_step"]
        bottom = 0.0
        for part, colour in zip(PARTS, colours, strict=False):
            height = 1e3 * median_parts(run)[part]
            axis.bar(0, height, 0.7, bottom, color=colour, label=part)
            bottom += height
        axis.text(0, bottom, f"{bottom:.0f}", ha="center", va="bottom", fontsize=8)
        for x, (_, seconds) in enumerate(variants.items(), 1):
            low, middle, high = (1e3 * s for s in spread(seconds))
            axis.bar(x, middle, 0.7, color="0.75", yerr=[[middle - low], [high - middle]], ecolor="0.3", capsize=2)
            axis.text(x, high, f"{middle:.0f}", ha="center", va="bottom", fontsize=8)
        labels = ["ours,\nits parts", *(names.get(name, name) for name in variants)]
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set_title(counted(run["ranks"], "rank"), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"ms per step of {runs[0]['global_batch_size']} images")
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes[0][-1].legend(handles[::-1], labels[::-1], fontsize=8, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    environment = runs[0]["environment"]
    hardware = environment["gpu"] or f"{environment['cores']} cores of {environment['processor']}"
    figure.suptitle(f"{results['settings']['name']}, {environment['precision']}, {hardware}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

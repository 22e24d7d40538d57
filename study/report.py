"""python study/report.py RUN [RUN ...] --out results/report

Tables and figures of tested runs side by side (report, tables 1 and 2). With --against, test whether the first runs,
seeds of one model, are better than others: python study/report.py A/seed0 A/seed1 --against B/seed0 B/seed1
"""

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from study.compare import compare, format_comparison
from study.experiments import LISTS
from study.runs import Run, mark_differences, read_runs
from utils.config import flag, parse
from utils.files import InputError, format_csv, write_bytes, write_json
from utils.script import run_script

# The report's tables 1 and 2: IoU, Dice and accuracy in percent, by a flawed protocol (see the README).
REPORTED = {
    "unet": (36, 45, 82), "autoencoder": (23, 30, 77), "clip_seg": (55, 61, 94), "point_clip": (37, 53, 56),
}  # fmt: skip
SCORES = ("iou", "dice", "accuracy")
BASELINES = {one.name: one.baseline for experiments in LISTS.values() for one in experiments if one.baseline}


@dataclass
class Config:
    """The flags."""

    runs: list[Path] = flag(None, "folders of runs scored by test.py", positional=True)
    against: list[Path] | None = flag(None, "is the mean IoU of the runs better than that of these?")
    out: Path = flag(Path("results/report"), "folder to write")
    data: Path | None = flag(None, "prepared folder with the photographs (default: where it was in testing)")
    examples: list[str] | None = flag(None, "test images to show (default: best, median and worst)")
    mixed: bool = flag(False, "accept scores made on different data or at different sizes, and mark them")


def main() -> None:
    config = parse(Config, __doc__)

    from utils.figures import save_figure

    runs = read_runs([*config.runs, *(config.against or [])])
    mark_differences(runs, allowed=config.mixed)
    if config.against:
        verdict = compare(runs[: len(config.runs)], runs[len(config.runs) :])
        write_json(config.out / "comparison.json", verdict)
        write_bytes(config.out / "comparison.md", format_comparison(verdict).encode())
        print(f"{format_comparison(verdict)}\n{config.out / 'comparison.md'}\n{config.out / 'comparison.json'}")
        return
    figures = make_figures(runs, pick_records(runs, config.data, config.examples))
    for name, (figure, _) in figures.items():
        save_figure(figure, config.out / f"{name}.png", pdf=True)
    rows = [describe(run) for run in runs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = format_csv(columns, ([_cell(row.get(key), ".4f") for key in columns] for row in rows))
    write_bytes(config.out / "runs.csv", table)
    captions = {name: caption for name, (_, caption) in figures.items()}
    write_bytes(config.out / "report.md", format_report(runs, captions).encode())
    print(format_scores(runs))
    print("\n".join(str(config.out / name) for name in ("report.md", "runs.csv", *(f"{f}.png" for f in figures))))


def pick_records(runs: Sequence[Run], data: Path | None, names: Sequence[str] | None) -> list[tuple[str, Any]]:
    """(caption, record) of the photographs to show: `names`, or best, median and worst by the runs' average mean IoU.

    Prompted runs count only if there are no others. InputError when the photographs are not where they were in testing,
    or a name was not tested.
    """
    from dataset.pet import find_records
    from utils.evaluation import pick_examples
    from utils.metric import nan_mean

    judges = [run for run in runs if not run.mark and not run.prompted] or [run for run in runs if not run.mark]
    mean = [nan_mean(values) for values in zip(*(run.image_iou for run in judges))]
    folder = data or Path(judges[0].metrics["config"]["data"])
    try:
        records = {record.name: record for record in find_records(folder, judges[0].metrics["config"]["split"])}
    except InputError as error:
        raise InputError(f"no photographs for the figure: {error}\nName their folder with --data.") from error
    if missing := [name for name in (*judges[0].images, *(names or ())) if name not in records]:
        found = f"{folder} lacks {len(missing)} of the images, for example {missing[0]}"
        raise InputError(f"{found}. Name the right --data.")
    if names:
        return [(name, records[name]) for name in names]
    tested = judges[0].images
    return [(f"{place}: {tested[i]}\nmean IoU {mean[i]:.2f}", records[tested[i]]) for place, i in pick_examples(mean)]


def make_figures(runs: Sequence[Run], examples: Sequence[tuple[str, Any]]) -> dict[str, tuple[Any, str]]:
    """The matplotlib figures with their captions, by name."""
    from study.figures import plot_classes, plot_curves, plot_examples, plot_robustness, plot_seeds
    from utils.evaluation import SYNTHETIC_NOTE

    notes = [SYNTHETIC_NOTE] if any(run.metrics["synthetic"] for run in runs) else []
    note = "; ".join([*notes, *(f"* {run.name}: {run.mark}" for run in runs if run.mark)])
    legend = {run.name: f"{run.title} (a click)" if run.prompted else run.title for run in runs}
    order = list(legend.values())
    figures = {}
    for prompted, name, caption in (
        (False, "classes", "IoU per class"),
        (True, "classes-prompted", "IoU per class of the models prompted by a click"),
    ):
        if group := {legend[run.name]: run.metrics["iou"] for run in runs if run.prompted == prompted}:
            figures[name] = plot_classes(group, order, note), caption
    rows = [describe(run) for run in runs if not run.prompted]
    if any(BASELINES.get(row["run"].split("/")[-1]) for row in rows):
        figures["seeds"] = plot_seeds(rows, note), "mIoU and boundary IoU, a dot per seed, a line at their mean"
    logs = {legend[run.name]: run.log for run in runs}
    figures["curves"] = plot_curves(logs, order, note), "Loss and mean IoU on the validation images"
    if studies := {legend[run.name]: run.robustness["perturbations"] for run in runs if run.robustness}:
        figures["robustness"] = plot_robustness(studies, order, note), "Mean Dice under the perturbations"
    shown = plot_examples(examples, [run for run in runs if not run.mark], note)
    figures["predictions"] = shown, "Test images with the masks of every run"
    return figures


def describe(run: Run) -> dict[str, Any]:
    """A run's row of runs.csv: its scores in percent, its settings, data, commit and hardware."""
    metrics, environment = run.metrics, run.metrics["environment"]
    # The report's models had neither skips nor the disk encoding.
    unreported = run.config.get("skips") or run.config.get("point_encoding") == "disk"
    reported = None if unreported else REPORTED.get(metrics["model"])
    row: dict[str, Any] = {"run": run.title, "model": metrics["model"]}
    row |= {kind: 100 * metrics[kind]["mean"] for kind in SCORES}
    row |= {f"report_{kind}": value for kind, value in zip(SCORES, reported or ("", "", ""))}
    row["boundary_iou"] = 100 * metrics["boundary_iou"]["mean"] if "boundary_iou" in metrics else None
    row |= {f"iou_{label}": value and 100 * value for label, value in metrics["iou"].items() if label != "mean"}
    row |= run.reconstruction["mean"]["autoencoder"] if run.reconstruction else {}  # psnr and ssim
    return row | {
        "pixel_accuracy": 100 * metrics["pixel_accuracy"],
        "baseline": metrics["baseline"]["name"],
        "baseline_iou": 100 * metrics["baseline"]["iou"]["mean"],
        **{key: metrics[key] for key in ("parameters", "trained_parameters", "images_per_second", "epoch")},
        "epochs": len(run.log),
        **{key: metrics[key] for key in ("seed", "image_size", "score_size", "images")},
        "data": Path(metrics["config"]["data"]).name + (" (synthetic)" if metrics["synthetic"] else ""),
        "split": metrics["config"]["split"],
        "commit": run.config.get("environment", {}).get("commit") or "",
        "hardware": f"{environment['device']}, {environment['cpus']} CPUs",
        "note": run.mark,
    }


def format_scores(runs: Sequence[Run]) -> str:
    """The report's table 1 (segmenters) and table 2 (prompted models), with its numbers beside ours, as Markdown."""
    parts = []
    for number, prompted in ((1, False), (2, True)):
        if rows := [describe(run) for run in runs if run.prompted == prompted]:
            heads = {
                "run": "run", "iou": "mIoU", "dice": "Dice", "accuracy": "accuracy", **_class_heads(rows[0]),
                "boundary_iou": "boundary IoU",
                "pixel_accuracy": "pixel accuracy", "baseline_iou": f"baseline mIoU ({rows[0]['baseline']})",
                "report_iou": "report: IoU", "report_dice": "Dice", "report_accuracy": "accuracy",
            }  # fmt: skip
            parts.append(
                f"Table {number}. {'Prompted by a click' if prompted else 'Segmentation'}, in percent. "
                f"The report's numbers come from another protocol and compare only roughly.\n\n{_table(rows, heads)}"
            )
    return "\n".join(parts)


def format_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a row per experiment: mean ± standard deviation over its seeds, from rows of runs.csv.

    The gain is the difference in mIoU to the experiment's baseline with the same seed (study/experiments.py).
    Returns "" when every experiment has one seed.
    """
    labels = _class_heads(rows[0])
    forms = {"iou": ".1f", "boundary_iou": ".1f", **dict.fromkeys(labels, ".1f"), "psnr": ".1f", "ssim": ".3f"}
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        numbers = {key: float(row[key]) for key in forms if row.get(key) not in (None, "")}
        groups.setdefault(row["run"].split("/")[-1], {})[row["seed"]] = numbers
    if all(len(seeds) == 1 for seeds in groups.values()):
        return ""
    table = []
    for name, seeds in groups.items():
        cells = {key: _spread([one[key] for one in seeds.values() if key in one], form) for key, form in forms.items()}
        base = groups.get(BASELINES.get(name, ""), {})
        gain = _spread([one["iou"] - base[seed]["iou"] for seed, one in seeds.items() if seed in base], "+.1f")
        table.append({"name": name, "gain": gain, "over": BASELINES[name] if gain else "", **cells})
    heads = {"name": "experiment", "iou": "mIoU", "gain": "gain", "over": "over", **labels}
    if any("boundary_iou" in row for row in rows):
        heads["boundary_iou"] = "boundary IoU"
    return _table(table, {**heads, "psnr": "PSNR, dB", "ssim": "SSIM"})


def _class_heads(row: dict[str, Any]) -> dict[str, str]:
    """Table heads of the IoU per class, by column of runs.csv."""
    return {key: f"IoU {key.removeprefix('iou_')}" for key in row if key.startswith("iou_")}


def _spread(values: Sequence[float], form: str) -> str:
    if len(values) < 2:
        return f"{values[0]:{form}}" if values else ""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+')}}"


def format_report(runs: Sequence[Run], figures: dict[str, str]) -> str:
    """report.md: the tables, and the figures with their captions."""
    rows = [describe(run) for run in runs]
    parts = ["# Comparison", format_scores(runs)]
    if seeds := format_seeds(rows):
        parts.append("Mean ± standard deviation over the seeds; IoU in percent:\n\n" + seeds)
    for row in rows:
        row["parameters"] = f"{row['parameters'] / 1e6:.2f} M ({row['trained_parameters'] / 1e6:.2f} M)"
        row["epochs"] = f"{row['epoch']} of {row['epochs']}"
        row["data"] = f"{row['data']}, {row['split']}: {row['images']}"
    heads = {
        "run": "run", "model": "model", "parameters": "parameters (trained)", "images_per_second": "images/s tested",
        "epochs": "epoch", "seed": "seed", "image_size": "image size", "score_size": "scored at",
        "data": "data: images", "commit": "commit", "hardware": "hardware",
    }  # fmt: skip
    parts.append("Settings:\n\n" + _table(rows, heads))
    if perturbed := [run for run in runs if run.robustness]:
        parts.append("Mean Dice at the last level, in percent of the clean one:\n\n" + format_retained(perturbed))
    parts += [f"\\* {run.name}: {run.mark}." for run in runs if run.mark]
    if any(run.metrics["synthetic"] for run in runs):
        parts.append("Synthetic drawings: the scores are not comparable to any benchmark.")
    parts += [f"![{caption}]({name}.png)\n\n{caption} ([PDF]({name}.pdf))." for name, caption in figures.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def format_retained(runs: Sequence[Run]) -> str:
    """A Markdown table, a row per run: its mean Dice at the last level of each perturbation, in percent of the clean
    one, and the mean over the perturbations that all runs have."""
    retained = {
        run.title: {name: 100 * entry["retained_last"] for name, entry in run.robustness["perturbations"].items()}
        for run in runs
    }
    names = list(dict.fromkeys(name for values in retained.values() for name in values))
    shared = [name for name in names if all(name in values for values in retained.values())]
    rows = [
        {"run": title, **values, "all": statistics.fmean(values[name] for name in shared) if shared else None}
        for title, values in retained.items()
    ]
    heads = {"run": "run", **{name: name.replace("_", " ") for name in names}}
    heads["all"] = "mean" if shared == names else f"mean of {', '.join(shared)}".replace("_", " ")
    return _table(rows, heads)


def _table(rows: Sequence[dict[str, Any]], heads: dict[str, str]) -> str:
    lines = [f"| {' | '.join(heads.values())} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(escape(_cell(row.get(key))) for key in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """The name of a folder or file as Markdown text: "|" would end a cell of a table, "$" begin a formula."""
    return re.sub(r"([|$\\])", r"\\\1", " ".join(text.split()))


def _cell(value: Any, form: str = ".1f") -> str:
    return "" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_script(main)

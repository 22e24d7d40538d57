"""python study/report.py RUN [RUN ...] --out results/report

Tables and figures of tested runs, side by side (report, tables 1 and 2). With --against, whether the first runs, seeds
of one model, are better than others: python study/report.py A/seed0 A/seed1 --against B/seed0 B/seed1
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from study.compare import compare, format_comparison
from study.runs import Run, mark_differences, read_runs
from utils.config import run_script
from utils.files import InputError, write_bytes, write_json

# The report's tables 1 and 2: IoU, Dice and accuracy in percent, by a protocol with flaws (see the README).
REPORTED = {
    "unet": (36, 45, 82), "autoencoder": (23, 30, 77), "clip_seg": (55, 61, 94), "point_clip": (37, 53, 56),
}  # fmt: skip
KINDS = ("iou", "dice", "accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that test.py has scored")
    parser.add_argument(
        "--against", nargs="+", type=Path, metavar="RUN", help="is the mean IoU of RUN better than of these?"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/report"), help="folder to write (default: results/report)"
    )
    parser.add_argument(
        "--data", type=Path, help="prepared folder with the photographs (default: where it was in testing)"
    )
    parser.add_argument("--mixed", action="store_true", help="put scores made on different data or at different sizes "
                        "into one table all the same, and mark them")  # fmt: skip
    args = parser.parse_args()

    runs = read_runs([*args.runs, *(args.against or [])])
    mark_differences(runs, allowed=args.mixed)
    if args.against:
        verdict = compare(runs[: len(args.runs)], runs[len(args.runs) :])
        write_json(args.out / "comparison.json", verdict)
        write_bytes(args.out / "comparison.md", format_comparison(verdict).encode())
        print(f"{format_comparison(verdict)}\n{args.out / 'comparison.md'}\n{args.out / 'comparison.json'}")
        return
    rows = pick_rows(runs, args.data)
    figures = draw(args.out, runs, rows)
    write_bytes(args.out / "table.csv", format_csv(runs).encode())
    write_bytes(args.out / "report.md", format_report(runs, figures).encode())
    print(format_scores(runs))
    print("\n".join(str(args.out / name) for name in ("report.md", "table.csv", *(f"{f}.png" for f in figures))))


def pick_rows(runs: Sequence[Run], data: Path | None) -> list[tuple[str, Any]]:
    """(caption, record) of the photographs to show: best, median and worst by the mean over the runs of their mean IoU.

    The segmenters decide, where there are any. InputError when the photographs are not where they were in testing.
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
    names = judges[0].images
    if missing := [name for name in names if name not in records]:
        raise InputError(
            f"{folder} lacks {len(missing)} of the images, {missing[0]} among them. Name the right --data."
        )
    return [(f"{rank}: {names[i]}\nmean IoU {mean[i]:.2f}", records[names[i]]) for rank, i in pick_examples(mean)]


def draw(out: Path, runs: Sequence[Run], rows: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Write the figures as PNG and PDF; returns their captions by name."""
    import numpy as np

    from utils import plot
    from utils.dataset import decode_label, overlay, to_rgb
    from utils.evaluation import SYNTHETIC_NOTE
    from utils.files import load_picture

    notes = [SYNTHETIC_NOTE] if any(run.metrics["synthetic"] for run in runs) else []
    notes += [f"* {run.name}: {run.mark}" for run in runs if run.mark]
    note = "; ".join(notes)
    legend = {run.name: run.title + " (a click)" * run.prompted for run in runs}
    order = list(legend.values())  # a run has the same look in every figure
    figures = {}
    for prompted, name in ((False, "classes"), (True, "classes-prompted")):
        group = {legend[run.name]: run.metrics["iou"] for run in runs if run.prompted == prompted}
        if group:
            figures[name] = "IoU per class" + (" of the models that are prompted by a click" if prompted else "")
            plot.plot_classes(out / f"{name}.png", group, order, note)
    figures["curves"] = "Learning curves: loss and mean IoU on the validation images"
    plot.plot_all_curves(out / "curves.png", {legend[run.name]: run.log for run in runs}, order, note)
    swept = {legend[run.name]: run.robustness["perturbations"] for run in runs if run.robustness}
    if swept:
        figures["robustness"] = "Mean Dice under the perturbations"
        plot.plot_all_robustness(out / "robustness.png", swept, order, note)

    shown = [run for run in runs if not run.mark]
    pictures = []
    for caption, record in rows:
        photo = np.asarray(to_rgb(load_picture(record.image)))
        cells = [photo, overlay(photo, record.load_label())]
        for run in shown:
            mask = run.folder / "test" / "masks" / f"{record.name}.png"
            # A prompted model may have had no click on the pet; what was scored at another size is enlarged.
            classes = decode_label(load_picture(mask).resize(photo.shape[1::-1], 0)) if mask.exists() else None
            if run.prompted and classes is not None:
                classes = np.where(classes == 1, record.species, 0)  # 1 is what was clicked, the pet
            cells.append(np.full_like(photo, 255) if classes is None else overlay(photo, classes))
        pictures.append((caption, cells))
    headings = ["photograph", "truth", *(run.name + "\n(a click)" * run.prompted for run in shown)]
    figures["predictions"] = "Best, median and worst test images, by the mean over the models of their mean IoU"
    plot.plot_comparison(out / "predictions.png", pictures, headings, note)
    return figures


def describe(run: Run) -> dict[str, Any]:
    """A run's row: its scores in percent, and what they were made with."""
    metrics, environment = run.metrics, run.metrics["environment"]
    # The report had neither skips nor disks.
    other = run.config.get("skips") or run.config.get("point_encoding") == "disk"
    reported = ("", "", "") if other else REPORTED.get(metrics["model"], ("", "", ""))
    row: dict[str, Any] = {"run": run.title, "model": metrics["model"]}
    row |= {kind: 100 * metrics[kind]["mean"] for kind in KINDS}
    row |= {f"report_{kind}": value for kind, value in zip(KINDS, reported)}
    row |= {f"iou_{label}": value and 100 * value for label, value in metrics["iou"].items() if label != "mean"}
    return row | {
        "pixel_accuracy": 100 * metrics["pixel_accuracy"],
        "baseline": metrics["baseline"]["name"],
        "baseline_iou": 100 * metrics["baseline"]["iou"]["mean"],
        "parameters": metrics["parameters"],
        "trained_parameters": metrics["trained_parameters"],
        "images_per_second": metrics["images_per_second"],
        "epoch": metrics["epoch"],
        "epochs": len(run.log),
        "seed": metrics["seed"],
        "image_size": metrics["image_size"],
        "score_size": metrics["score_size"],
        "images": metrics["images"],
        "data": Path(metrics["config"]["data"]).name + (" (synthetic)" if metrics["synthetic"] else ""),
        "split": metrics["config"]["split"],
        "commit": run.config.get("environment", {}).get("commit") or "",
        "hardware": f"{environment['device']}, {environment['cpus']} CPUs",
        "note": run.mark,
    }


def format_csv(runs: Sequence[Run]) -> str:
    """A row per run, every column of any of them."""
    rows = [describe(run) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{key: _cell(value, ".2f") for key, value in row.items()} for row in rows])
    return text.getvalue()


def format_scores(runs: Sequence[Run]) -> str:
    """The report's table 1 (segmenters) and table 2 (prompted models), with its numbers beside ours, as Markdown."""
    parts = []
    for number, prompted in ((1, False), (2, True)):
        rows = [describe(run) for run in runs if run.prompted == prompted]
        if rows:
            labels = [key for key in rows[0] if key.startswith("iou_")]
            parts.append(
                f"Table {number}. {'Prompted by a click' if prompted else 'Segmentation'}, in percent. "
                "The report's numbers are of another protocol and compare only roughly.\n\n"
                + _table(rows, {
                    "run": "run", "iou": "mIoU", "dice": "Dice", "accuracy": "accuracy",
                    **{label: f"IoU {label.removeprefix('iou_')}" for label in labels},
                    "pixel_accuracy": "pixel accuracy", "baseline_iou": f"baseline mIoU ({rows[0]['baseline']})",
                    "report_iou": "report: IoU", "report_dice": "Dice", "report_accuracy": "accuracy",
                })
            )  # fmt: skip
    return "\n".join(parts)


def format_report(runs: Sequence[Run], figures: dict[str, str]) -> str:
    """report.md: the tables, and the figures with their captions."""
    rows = [describe(run) for run in runs]
    for row in rows:
        row["parameters"] = f"{row['parameters'] / 1e6:.2f} M ({row['trained_parameters'] / 1e6:.2f} M)"
        row["epochs"] = f"{row['epoch']} of {row['epochs']}"
        row["data"] = f"{row['data']}, {row['split']}: {row['images']}"
    made = _table(rows, {
        "run": "run", "model": "model", "parameters": "parameters (trained)", "images_per_second": "images/s tested",
        "epochs": "epoch", "seed": "seed", "image_size": "image size", "score_size": "scored at",
        "data": "data: images", "commit": "commit", "hardware": "hardware",
    })  # fmt: skip
    parts = ["# Comparison", format_scores(runs), "How they were made:\n\n" + made]
    swept = [run for run in runs if run.robustness]
    if swept:
        left = {
            run.title: {name: 100 * entry["retained_last"] for name, entry in run.robustness["perturbations"].items()}
            for run in swept
        }
        names = list(dict.fromkeys(name for values in left.values() for name in values))
        shared = [name for name in names if all(name in values for values in left.values())]
        table = [
            {"run": title, **values, "all": statistics.fmean(values[name] for name in shared) if shared else None}
            for title, values in left.items()
        ]
        heads = {"run": "run", **{name: name.replace("_", " ") for name in names}}
        heads["all"] = "mean" if shared == names else f"mean of {', '.join(shared)}".replace("_", " ")
        parts.append("Mean Dice at the last level, in percent of the clean one:\n\n" + _table(table, heads))
    notes = [f"\\* {run.name}: {run.mark}." for run in runs if run.mark]
    if any(run.metrics["synthetic"] for run in runs):
        notes.append("Synthetic drawings: the scores compare with nothing.")
    parts += notes
    parts += [f"![{caption}]({name}.png)\n\n{caption} ([PDF]({name}.pdf))." for name, caption in figures.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(rows: Sequence[dict[str, Any]], heads: dict[str, str]) -> str:
    lines = [f"| {' | '.join(heads.values())} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in heads)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any, form: str = ".1f") -> str:
    return "" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_script(main)

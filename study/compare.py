"""Is model A better than model B? A paired bootstrap over test images (Efron and Tibshirani 1993)."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from study.runs import Run
from utils.files import InputError


def compare(ours: Sequence[Run], theirs: Sequence[Run], resamples: int = 2000) -> dict[str, Any]:
    """Is the mean IoU of `ours` (runs of one model over seeds) better than that of `theirs`? Scores in 0..1.

    Each resample draws test images with replacement, the same for all runs, and compares the means over the runs on
    each side. The interval covers test-image sampling; the standard deviation covers seeds. InputError when the runs
    were scored on other images or classes, or a side mixes models.
    """
    if marked := [run for run in (*ours, *theirs) if run.mark]:
        raise InputError(f"a paired comparison needs the same images for all: {marked[0].name} was {marked[0].mark}")
    for run in (*ours, *theirs):
        if run.counts.shape != ours[0].counts.shape:
            raise InputError(f"{ours[0].name} and {run.name} have different classes")
    for side in (ours, theirs):
        if len({run.metrics["model"] for run in side}) > 1:
            names = ", ".join(f"{run.name} ({run.metrics['model']})" for run in side)
            raise InputError(f"each side is to be one model over seeds, got {names}")
    images, verdict = len(ours[0].images), {}
    weights = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=resamples)
    means = []  # over the runs of a side, for each resample
    for side, runs in (("ours", ours), ("theirs", theirs)):
        means.append(np.mean([resampled_iou(run.counts, weights) for run in runs], axis=0))
        scores = [resampled_iou(run.counts, np.ones((1, images), np.int64)).item() for run in runs]
        std = statistics.stdev(scores) if len(scores) > 1 else None
        verdict[side] = {"runs": [run.name for run in runs], "mean": statistics.fmean(scores), "std": std}
    difference = means[0] - means[1]
    return {
        **verdict,
        "difference": verdict["ours"]["mean"] - verdict["theirs"]["mean"],
        "interval_95": np.quantile(difference, (0.025, 0.975)).tolist(),
        "share_better": float((difference > 0).mean()),
        "images": images,
        "resamples": resamples,
    }


def resampled_iou(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean IoU (R,) of counts (N, C, C) summed with weights (R, N); classes without pixels are left out."""
    total = np.einsum("rn,nij->rij", weights, counts, optimize=True)
    hit = np.einsum("rii->ri", total)
    union = total.sum(axis=1) + total.sum(axis=2) - hit
    return np.nanmean(np.where(union > 0, hit / np.maximum(union, 1), np.nan), axis=1)


def format_comparison(verdict: dict[str, Any]) -> str:
    """A comparison as Markdown."""
    lines = []
    for entry in (verdict["ours"], verdict["theirs"]):
        std = "" if entry["std"] is None else f" ± {100 * entry['std']:.1f} (standard deviation over runs)"
        lines.append(f"- {', '.join(entry['runs'])}: mIoU {100 * entry['mean']:.1f}{std}\n")
    low, high = verdict["interval_95"]
    answer = "better" if low > 0 else "worse" if high < 0 else "no significant difference"
    return "".join(lines) + (
        f"\nDifference {100 * verdict['difference']:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f} "
        f"(paired bootstrap over {verdict['images']} test images, {verdict['resamples']} resamples), above zero in "
        f"{100 * verdict['share_better']:.1f} % of them: {answer}. The interval covers test-image sampling; the "
        "standard deviation covers seeds.\n"
    )

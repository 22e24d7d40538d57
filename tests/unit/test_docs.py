"""README.md, docs/ and results/ agree with the code and with the results' own files."""

import importlib
import re
import shlex
from dataclasses import fields
from functools import cache

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from autoencoder.model import AutoencoderSegmenter, Encoder
from clip_seg.model import ClipEncoder, ClipSegmenter
from models import MODELS
from point_clip.model import PointClip
from study.experiments import LISTS
from study.report import SCORES, format_seeds
from tests.helpers import ROOT
from unet.model import UNet
from utils.config import flag_name
from utils.files import read_csv, read_json

README = "README.md"
PATTERNS = (README, "docs/*.md", "results/**/README.md", "benchmarks/README.md")
PAGES = [path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
RESULTS = sorted(path.parent.name for path in ROOT.glob("results/*/runs.csv"))


@cache
def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str):
    """The words of every command in a page's code blocks that runs a script of the repository, from its path on."""
    for block in re.findall(r"^```(?:bash|console|sh)?\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = shlex.split(line, comments=True, posix=False)
            scripts = [number for number, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)]
            if scripts and re.match(r"(\S*/)?(python3?|torchrun|accelerate)$", words[0]):
                yield words[scripts[0] :]


def test_flags_page_is_up_to_date():
    from docs.make_flags import flags_markdown

    assert read("docs/flags.md") == flags_markdown(), "run: python docs/make_flags.py"


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_files(page):
    targets = re.findall(r"(?:\]\(|src=\")(?!https?:|#)([^)#\s\"]+)", read(page))
    missing = [target for target in targets if not ((ROOT / page).parent / target).exists()]
    assert not missing, f"{page} links to files that do not exist: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_and_flags_that_exist(page):
    inline = re.findall(r"python (?:-m )?([\w/]+\.py)", read(page))
    missing = [path for path in (*inline, *(words[0] for words in commands(page))) if not (ROOT / path).is_file()]
    assert not missing, f"{page} runs scripts that do not exist: {', '.join(missing)}"
    for script, *arguments in commands(page):
        names = [word.partition("=")[0] for word in arguments if re.match(r"--\w", word)]
        unknown = {name.replace("--no-", "--") for name in names} - flags_of(script)
        if "--" in arguments and script == "study/run.py":
            unknown -= set().union(*(flags_of(f"{model}/train.py") for model in MODELS))
        assert not unknown, f"{page} runs {script} with {', '.join(sorted(unknown))}, which it does not have"


@cache
def flags_of(script: str) -> set[str]:
    config = importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config
    return {flag_name(field.name) for field in fields(config)} | {"--help"}


def test_readme_is_short():
    assert len(read(README).splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_at_most_120_columns_wide(page):
    """Tables and the targets of links do not count."""
    lines = [line for line in read(page).splitlines() if not line.startswith("|")]
    wide = [line for line in lines if len(re.sub(r"\]\([^)]*\)|https?://\S+", "", line)) > 120]
    assert not wide, f"{page} has wider lines: {wide}"


def test_every_experiment_is_described():
    names = {one.name for experiments in LISTS.values() for one in experiments}
    missing = [name for name in names if f"`{name}`" not in read("docs/flags.md")]
    assert not missing, f"docs/flags.md lacks {missing}: run make docs"


@pytest.mark.parametrize("name", ["demo", "unet", "pretraining", "robustness", "clicks", "cpu"])
def test_every_question_has_results(name):
    assert name in RESULTS and f"results/{name}/README.md" in PAGES


def pages_about(folder: str) -> str:
    """The pages that may quote the results of a folder."""
    return "\n".join(map(read, sorted({README, "results/README.md", f"results/{folder}/README.md"} & set(PAGES))))


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("results/*/metrics.json")))
def test_tables_of_scores_equal_the_metrics(folder):
    """The table of scores by class, and the row of runs.csv, are those of metrics.json."""
    metrics = read_json(ROOT / f"results/{folder}/metrics.json")
    text = pages_about(folder)
    for name in metrics["iou"]:
        row = f"| {name} | " + " | ".join(f"{100 * metrics[kind][name]:.1f}" for kind in SCORES) + " |"
        assert row in text, f"no page has the row {row} of results/{folder}/metrics.json"
    row = " | ".join(f"{100 * metrics['baseline'][kind]['mean']:.1f}" for kind in SCORES)
    assert f"| {row} |" in text, f"no page has the baseline {row} of results/{folder}/metrics.json"
    (run,) = read_csv(ROOT / f"results/{folder}/runs.csv")
    for kind in SCORES:
        assert float(run[kind]) == pytest.approx(100 * metrics[kind]["mean"], abs=6e-5)


def test_table_of_the_pretraining_study_is_made_of_its_runs():
    assert read("results/pretraining/table.md") == format_seeds(read_csv(ROOT / "results/pretraining/runs.csv"))


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("results/*/table.md")))
def test_quoted_rows_are_rows_of_the_table(folder):
    """A row of a page that begins with a run of results/FOLDER/table.md and has as many cells is in that table."""
    rows = {tuple(cells(line)) for line in read(f"results/{folder}/table.md").splitlines()}
    names, lengths = {row[0] for row in rows} - {"run", "experiment"}, {len(row) for row in rows}
    quoted = [tuple(cells(line)) for line in pages_about(folder).splitlines() if line.startswith("|")]
    wrong = [row for row in quoted if row[0] in names and len(row) in lengths and row not in rows]
    assert not wrong, f"results/{folder}/table.md does not have these rows, which are quoted: {wrong}"


COLUMNS = {"boundary IoU": "boundary_iou",   # heads of tables whose rows are runs, and the columns of runs.csv
    "mIoU": "iou", "Dice": "dice", "accuracy": "accuracy", "baseline mIoU": "baseline_iou",
    "clicks inside their own mask": "own_mask", "mask follows the click": "flips",
}  # fmt: skip


@pytest.mark.parametrize("folder", RESULTS)
def test_tables_of_runs_equal_runs_csv(folder):
    """A row of a page that begins with the name of a run in results/FOLDER/runs.csv holds that run's scores."""
    runs = {row["run"]: row for row in read_csv(ROOT / f"results/{folder}/runs.csv")}
    head = []
    for line in read(f"results/{folder}/README.md").splitlines():
        row = cells(line) if line.startswith("|") else []
        head = row and (head or row)
        run = row and runs.get(row[0].split(",")[0].strip("`"))
        for name, cell in zip(head, row) if run and head[0] == "run" else ():
            column = COLUMNS.get(name, f"iou_{name.removeprefix('IoU ')}")
            if cell and column in run:
                assert cell == f"{float(run[column]):.1f}", f"{run['run']}: {name}"


def cells(line: str) -> list[str]:
    return [cell.strip(" *`") for cell in line.strip().strip("|").split("|")]


def test_linked_scores_are_those_of_the_results():
    """A number that links to the page of a result, such as [64.6](results/unet/README.md), is one of its mean IoUs."""
    links = re.findall(r"\[(\d+\.\d(?: ± \d+\.\d)?)\]\(results/(\w+)/README\.md\)", read(README))
    assert links, "README.md has no number that links to a result"
    for number, folder in links:
        rows = read_csv(ROOT / f"results/{folder}/runs.csv")
        known = {f"{float(row['iou']):.1f}" for row in rows}
        known |= {cells(line)[1] for line in format_seeds(rows).splitlines()}
        assert number in known, f"not a mean IoU of results/{folder}/runs.csv"


def test_numbers_of_parameters_are_those_of_the_models():
    with torch.device("meta"):
        encoder = ClipEncoder(CLIPVisionModel(CLIPVisionConfig()))  # ViT-B/32
        models = {
            "unet": [UNet()],
            "autoencoder": [AutoencoderSegmenter(Encoder())],
            "clip_seg": [ClipSegmenter(encoder)],
            "point_clip": [PointClip(encoder, encoding=encoding) for encoding in ("heatmap", "disk")],
        }
    for page in (README, "docs/models.md"):
        for folder, variants in models.items():
            (row,) = re.findall(rf"^\| \[`{folder}/`\].*", read(page), flags=re.MULTILINE)
            for model in variants:
                millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
                assert f"{millions:.{1 if millions > 1 else 2}f} M" in row, f"{page}, {folder}: {millions}"

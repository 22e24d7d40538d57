"""dataset/exploration.py: its numbers against the files, and its figures against the numbers."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from dataset.exploration import format_summary, main, measure, plot_augmented, plot_data, plot_sheet, summarize
from dataset.pet import find_records
from utils.dataset import IGNORE, PETS
from utils.files import InputError
from utils.image import load_picture


@pytest.fixture(scope="module")
def records(prepared):
    return {split: find_records(prepared, split) for split in ("TrainVal", "Test")}


@pytest.fixture(scope="module")
def measured(records):
    return {split: measure(split, records[split]) for split in records}


@pytest.fixture(scope="module")
def summary(measured):
    return summarize(measured)


@pytest.fixture(scope="module")
def figures(measured, summary):
    return plot_data(measured, summary)


def texts(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


def legend(axis) -> list[str]:
    return texts(axis.get_legend().get_texts())


def widths(axis) -> dict[str, list[float]]:
    return {bars.get_label(): [bar.get_width() for bar in bars] for bars in axis.containers}


def test_the_numbers_are_those_of_the_files(prepared, records, summary):
    assert summary["images"] == {
        "TrainVal": {"cats": 4, "dogs": 8}, "Test": {"cats": 4, "dogs": 8},
        "TrainVal, balanced": {"cats": 8, "dogs": 8},
    }  # fmt: skip
    assert summary["breeds"] == {"Synthetic_cat (cat)": 8, "synthetic_dog (dog)": 16}

    labels = {split: [np.asarray(Image.open(record.label)) for record in records[split]] for split in records}
    pixels = np.concatenate([label.ravel() for label in labels["TrainVal"]])
    shares = summary["pixel_share"]
    for name, value in (("background", 0), ("cat", 1), ("dog", 2), ("boundary", IGNORE)):
        assert shares["TrainVal"][name] == pytest.approx((pixels == value).mean()), name
    assert sum(shares["TrainVal, balanced"].values()) == pytest.approx(1)
    assert shares["TrainVal, balanced"]["cat"] > shares["TrainVal"]["cat"]

    every = [(label, record) for split in records for label, record in zip(labels[split], records[split])]
    found, edges = summary["width"], [label.shape[1] for label, _ in every]
    assert (found["min"], found["median"], found["max"]) == (min(edges), np.median(edges), max(edges))
    ratios = [label.shape[1] / label.shape[0] for label, _ in every]
    assert summary["aspect_ratio"]["95 %"] == pytest.approx(np.quantile(ratios, 0.95), abs=1e-4)
    cats = [(label == 1).sum() / (label != IGNORE).sum() for label, record in every if record.species == 1]
    assert summary["pet_share"]["cats"]["max"] == pytest.approx(max(cats), abs=1e-4)

    text = format_summary(prepared, summary)
    for part in (*summary["images"], *shares["Test"], *summary["pet_share"], "2 breeds", f"{max(edges)}"):
        assert part in text, part


def test_the_position_map_is_where_the_pet_is(records, measured):
    for record, image in zip(records["Test"], measured["Test"]):
        label = np.asarray(Image.open(record.label))
        for axis in (0, 1):
            expected = np.nonzero(label == record.species)[axis].mean() / label.shape[axis]
            found = (np.nonzero(image.pet)[axis].mean() + 0.5) / len(image.pet)
            assert found == pytest.approx(expected, abs=0.02), (record.name, axis)


def test_the_species_figure_shows_the_counts(figures, summary):
    [axis] = figures["species"].axes
    assert texts(axis.get_xticklabels()) == list(summary["images"])
    for bars, (folder, value) in zip(axis.containers, PETS.species.items(), strict=True):
        assert bars.get_label() == folder
        assert [bar.get_height() for bar in bars] == [counts[folder] for counts in summary["images"].values()]
        assert {to_rgb(bar.get_facecolor()) for bar in bars} == {PETS.plot_color(value)}
    assert texts(figures["species"].legends[0].get_texts()) == list(PETS.species)


def test_the_breeds_figure_shows_a_bar_per_breed(figures, summary):
    [axis] = figures["breeds"].axes
    assert widths(axis) == {"cats": [8], "dogs": [16]}
    assert texts(axis.get_yticklabels()) == ["synthetic dog", "Synthetic cat"]


def test_the_sizes_figure_shows_every_photograph(figures, measured):
    scatter, histogram = figures["sizes"].axes
    for line, value in zip(scatter.lines, PETS.species.values(), strict=True):
        every = [image for images in measured.values() for image in images if image.species == value]
        assert list(map(tuple, line.get_xydata())) == [(image.width, image.height) for image in every]
        assert line.get_label() == PETS.row(value).folder
    assert (scatter.get_xlabel(), scatter.get_ylabel()) == ("width, pixels", "height, pixels")
    assert histogram.get_xlabel() == "width / height" and legend(histogram) == list(PETS.species)
    count = max(patch.get_xy()[:, 1].max() for patch in histogram.patches)
    assert 0 < count <= 16, "photographs in the highest bin"


def test_the_pixels_figure_shows_the_shares(figures, summary):
    stacked, histogram = figures["pixels"].axes
    shares = summary["pixel_share"]
    assert texts(stacked.get_yticklabels()) == list(shares)
    assert list(widths(stacked)) == legend(stacked) == [*PETS.names, "boundary"]
    for name, bars in widths(stacked).items():
        assert bars == pytest.approx([100 * part[name] for part in shares.values()]), name
    ends = [bar.get_x() + bar.get_width() for bar in stacked.containers[-1]]
    assert ends == pytest.approx([100] * len(shares)), "the bars fill the width"
    assert "pet" in histogram.get_xlabel() and legend(histogram) == list(PETS.species)


def test_the_places_figure_shows_the_mean_position_map_of_each_species(figures, measured):
    *maps, colorbar = figures["places"].axes
    assert colorbar.get_ylabel() == "photographs with a pet there, %"
    for axis, (folder, value) in zip(maps, PETS.species.items(), strict=True):
        pets = [image.pet for images in measured.values() for image in images if image.species == value]
        np.testing.assert_allclose(axis.images[0].get_array(), 100 * np.mean(pets, axis=0))
        assert axis.get_title() == folder


def test_the_contact_sheets_show_photographs_with_their_labels(records):
    by_name = {record.name: record for record in records["TrainVal"]}
    sheet = plot_sheet(records["TrainVal"], seed=0)
    shown = [axis for axis in sheet.axes if axis.images]
    assert {axis.get_title() for axis in shown} == set(by_name)
    for axis in shown:
        record = by_name[axis.get_title()]
        expected = PETS.overlay(np.asarray(load_picture(record.image)), record.load_label())
        np.testing.assert_array_equal(axis.images[0].get_array(), expected, err_msg=record.name)
    assert texts(sheet.legends[0].get_texts()) == ["cat", "dog", "boundary, not scored"]

    many = [*records["TrainVal"], *records["Test"], *records["TrainVal"]]  # more than fit on the sheet
    first, other = ([axis.get_title() for axis in plot_sheet(many, seed).axes if axis.images] for seed in (0, 1))
    assert len(first) < len(many) and first != other, "the seed selects the photographs"


def test_the_augmented_sheet_shows_each_photograph_in_several_epochs(records):
    shown = [axis for axis in plot_augmented(records["TrainVal"], seed=0, size=32).axes if axis.images]
    names = {record.name for record in records["TrainVal"]}
    assert 0 < sum(axis.get_title() in names for axis in shown) < len(shown)
    pictures = {axis.images[0].get_array().tobytes() for axis in shown}
    assert len(pictures) > 0.9 * len(shown), "each epoch shows another augmentation"


@pytest.mark.parametrize("species", PETS.species.values(), ids=PETS.species)
def test_data_of_one_species_are_drawn_too(species, measured):
    split = [image for image in measured["TrainVal"] if image.species == species]
    alone = summarize({"TrainVal": split})
    figures = plot_data({"TrainVal": split}, alone)
    folder = PETS.row(species).folder
    assert legend(figures["sizes"].axes[1]) == legend(figures["pixels"].axes[1]) == [folder]
    assert [axis.get_title() for axis in figures["places"].axes[:-1]] == [folder]
    assert folder in format_summary(split[0].name, alone)


def test_unprepared_data_name_the_command(originals, monkeypatch):
    monkeypatch.setattr("sys.argv", ["exploration.py", str(originals)])
    with pytest.raises(InputError, match=r"is not prepared\. Run: python dataset/dataset_prep\.py"):
        main()

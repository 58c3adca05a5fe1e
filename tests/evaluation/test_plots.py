import itertools

import numpy as np
import pytest
from made_up_outcomes import SPACE
from PIL import Image

from joint_controller.evaluation.plots import (
    SWEEP_PICTURE_FILE,
    draw_accuracy_latency,
    draw_choices,
    draw_knob_shares,
    middle_budget,
    place_labels,
    plot_sweep_pictures,
    policy_styles,
)
from joint_controller.evaluation.request_table import Choices, build_request_table
from joint_controller.evaluation.summary import summarize


COLORS = {"controller": (0x00, 0x72, 0xB2), "static": (0xD5, 0x5E, 0x00), "full": (0x76, 0x76, 0x76)}
BUDGETS = (10.0, 20.0, 30.0)
FILES = ["accuracy_latency.png", "budget.png", "knob_shares.png"]
TYPES = ("color", "count")


def make_samples(num_samples=12, size=(30, 20)):
    """Two questions about each image."""
    return [
        {
            "sample_id": f"shapes/{number}",
            "image": Image.new("RGB", size, (number // 2, 7, 7)),
            "question": f"does it cost $5 or ${number}?",
            "question_type": TYPES[number % 2],
        }
        for number in range(num_samples)
    ]


def make_table(
    runs=(("controller", 1), ("static", -1), ("full", -1)), budgets=BUDGETS, latency_scale=1.0, samples=None
):
    """Each policy chooses what its place and the budget say; the k-th setting takes 4 (k + 1) ms and answers by turns."""
    samples = make_samples() if samples is None else samples
    size = len(samples)
    choices = []
    for step, budget in enumerate(budgets):
        for number, (policy, seed) in enumerate(runs):
            position = 5 if policy == "full" else (step + number) % 5
            choices.append(Choices(policy, seed, budget / 30, budget, np.full(size, position), np.full(size, 0.5)))
    latency_ms = latency_scale * np.tile(4.0 * np.arange(1, 7), (size, 1))
    accuracy = (np.arange(size)[:, None] % 6 <= np.arange(6)).astype(float)
    return build_request_table(SPACE, samples, choices, accuracy, latency_ms)


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def count_pixels(picture, color) -> int:
    return int((picture == np.array(color)).all(axis=-1).sum())


def test_pictures_are_written_and_have_a_line_for_each_policy(tmp_path):
    files = plot_sweep_pictures(make_table(), tmp_path / "new")
    assert [file.relative_to(tmp_path / "new").as_posix() for file in files] == FILES
    assert SWEEP_PICTURE_FILE == FILES[0]
    for file in files[:2]:
        picture = pixels_of(file)
        for corner in (picture[0, 0], picture[0, -1], picture[-1, 0], picture[-1, -1]):
            assert corner.tolist() == [255, 255, 255]
        for policy, color in COLORS.items():
            assert count_pixels(picture, color) > 100, (file, policy)


def test_markers_are_hollow_where_more_than_one_request_in_twenty_is_late(tmp_path):
    """The same picture, with latencies all within or all above the budgets."""
    filled, hollow = (
        draw_accuracy_latency(summarize(make_table([("controller", 1)], latency_scale=scale), None))
        for scale in (0.5, 50.0)
    )
    faces = [
        [points.get_facecolor()[0].tolist() for points in one.axes[0].collections[1:]] for one in (filled, hollow)
    ]
    blue = [channel / 255 for channel in COLORS["controller"]]
    assert np.allclose(faces[0], [*blue, 1.0]) and np.allclose(faces[1], 1.0)
    assert len(faces[0]) == len(BUDGETS)


def test_bars_go_to_the_ends_of_the_intervals():
    summary = summarize(make_table([("controller", 1)]), None)
    [bars] = [
        one for one in draw_accuracy_latency(summary).axes[0].collections if one.__class__.__name__ == "LineCollection"
    ]
    ends = sorted(tuple(segment[:, 1]) for segment in bars.get_segments())
    expected = sorted(
        (row["accuracy_low"], row["accuracy_high"]) for row in summary.to_list() if row["dataset"] == "all"
    )
    assert np.allclose(ends, expected)


@pytest.mark.parametrize("budgets", [BUDGETS[:1], BUDGETS])
@pytest.mark.parametrize("runs", [[("static", -1)], [("controller", 1)], [("my policy", 3), ("$another$", 3)]])
def test_few_budgets_one_policy_and_unknown_policies(tmp_path, runs, budgets):
    files = plot_sweep_pictures(make_table(runs, budgets), tmp_path)
    has_controller = runs[0][0] == "controller"
    assert [file.name for file in files] == FILES[: 3 if has_controller else 2]
    assert all(file.stat().st_size > 5_000 for file in files)


def test_seeds_of_a_policy_are_one_line():
    summary = summarize(make_table([("controller", 1), ("controller", 2), ("static", -1)]), None)
    axes = draw_accuracy_latency(summary).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["controller", "static"]
    assert "2 seeds" in axes.get_title(loc="left")
    expected = [row["accuracy"] for row in summary.to_list() if row["policy"] == "controller"][: len(BUDGETS)]
    assert axes.lines[0].get_ydata().tolist() == expected


@pytest.mark.parametrize("num_policies", [1, 8, 12])
def test_labels_cover_neither_each_other_nor_leave_the_axes(num_policies, tmp_path):
    """Also where all lines end in one place, as they do here by threes."""
    runs = [(f"policy of a long name {number}", number) for number in range(num_policies)]
    figure = draw_accuracy_latency(summarize(make_table(runs), None))
    figure.savefig(tmp_path / "picture.png")
    area = figure.axes[0].get_window_extent()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == num_policies
    for box in boxes:
        assert area.x0 - 1 <= box.x0 and box.x1 <= area.x1 + 1 and area.y0 - 1 <= box.y0 and box.y1 <= area.y1 + 1
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*(box.extents for box in pair)) > 0]


def overlap(one, other):
    width, height = (min(one[2 + side], other[2 + side]) - max(one[side], other[side]) for side in (0, 1))
    return max(width, 0) * max(height, 0)


def test_labels_are_next_to_their_points_where_there_is_room():
    area = (0.0, 0.0, 400.0, 300.0)
    assert place_labels([(100.0, 150.0)], [(50.0, 10.0)], area) == [(110.0, 145.0)]
    [(x, y)] = place_labels([(395.0, 150.0)], [(50.0, 10.0)], area)  # not beyond the edge, nor on the point
    assert x + 50.0 <= 400.0 and not (x <= 395.0 <= x + 50.0 and y <= 150.0 <= y + 10.0)
    assert place_labels([], [], area) == []
    [(x, y)] = place_labels([(100.0, 150.0)], [(50.0, 10.0)], area, obstacles=[(120.0, 150.0)])
    assert not (x <= 120.0 <= x + 50.0 and y <= 150.0 <= y + 10.0)


def test_labels_of_many_points_do_not_overlap():
    generator = np.random.default_rng(0)
    anchors = [tuple(point) for point in generator.uniform((150, 100), (250, 160), (14, 2))]
    sizes = [(width, 12.0) for width in generator.uniform(30, 110, 14)]
    places = place_labels(anchors, sizes, (0.0, 0.0, 400.0, 300.0))
    boxes = [(x, y, x + width, y + height) for (x, y), (width, height) in zip(places, sizes, strict=True)]
    assert max(overlap(*pair) for pair in itertools.combinations(boxes, 2)) == 0
    assert all(x0 >= 0 and y0 >= 0 and x1 <= 400 and y1 <= 300 for x0, y0, x1, y1 in boxes)


def test_policies_keep_their_colors_and_references_are_gray():
    styles = policy_styles(["full", "fits", "static", "controller", *map(str, range(8))])
    assert (styles["controller"]["color"], styles["static"]["color"]) == ("#0072B2", "#D55E00")
    assert styles["full"]["color"] == styles["7"]["color"] == "#767676"
    colors = [style["color"] for style in styles.values() if style["color"] != "#767676"]
    assert len(set(colors)) == len(colors) == 7
    assert len({style["marker"] for style in styles.values()}) == len(styles)


def test_shares_of_knobs_are_those_of_the_table():
    table = make_table([("controller", 1), ("controller", 2)])
    figure = draw_knob_shares(table)
    rows = [row for row in table.to_list() if row["policy"] == "controller"]
    for place, (knob, values) in enumerate({"size": ["small", "large"], "depth": [1, 2, 3]}.items()):
        panel = figure.axes[place]  # the first row: by budget
        legend = panel.get_legend()
        assert legend.get_title().get_text() == knob
        # The cheaper first, though the words sort the other way.
        assert [text.get_text() for text in legend.get_texts()] == list(map(str, values))
        heights = np.array([bar.get_height() for bar in panel.patches]).reshape(len(values), len(BUDGETS))
        for step, budget in enumerate(BUDGETS):
            chosen = [row[knob] for row in rows if row["latency_budget_ms"] == budget]
            assert heights[:, step].tolist() == pytest.approx([chosen.count(one) / len(chosen) for one in values])
        by_type = figure.axes[len(SPACE.names) + place]
        widths = np.array([bar.get_width() for bar in by_type.patches]).reshape(len(values), len(TYPES))
        assert np.allclose(widths.sum(axis=0), 1.0)
        assert by_type.get_xlabel() == "at a budget of 0.67"


@pytest.mark.parametrize(("budgets", "middle"), [([3.0], 3.0), ([1.0, 3.0, 2.0], 2.0), ([1.0, 2.0], 2.0)])
def test_the_middle_budget(budgets, middle):
    assert middle_budget(budgets) == middle


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_choices_show_eight_images_with_what_up_to_four_policies_did(tmp_path):
    samples = make_samples(24)
    runs = [("random", -1), ("fits", -1), ("full", -1), ("static", -1), ("controller", 1), ("controller", 2)]
    table = make_table(runs, samples=samples)
    files = plot_sweep_pictures(table, tmp_path, samples)
    assert [file.name for file in files] == [*FILES, "choices.png"]
    figure = draw_choices(table, samples)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 8
    assert len({axes.images[0].get_array()[0, 0, 0] for axes in panels}) == 8  # no image twice
    by_question = {sample["question"]: sample["sample_id"] for sample in samples}
    for axes in panels:
        sample_id = by_question[axes.get_title(loc="left")]
        shown = texts_of(axes)
        for policy, line in zip(("controller", "static", "fits", "full"), shown, strict=True):
            row = next(
                row
                for row in table.to_list()
                if row["policy"] == policy and row["sample_id"] == sample_id and row["latency_budget_ms"] == 20.0
            )
            mark = "✓" if row["accuracy"] == 1 else "✗"
            late = " (late)" if row["latency_ms"] > 20 else ""
            assert line == f"{mark} {policy}: {row['size']} · {row['depth']}, {row['latency_ms']:.1f} ms{late}"


def test_samples_without_images_have_no_picture_and_others_samples_are_refused(tmp_path):
    samples = [{**sample, "image": None} for sample in make_samples()]
    assert [file.name for file in plot_sweep_pictures(make_table(), tmp_path, samples)] == FILES
    with pytest.raises(ValueError, match="none of the 1 samples is in the request table"):
        draw_choices(make_table(), [{"sample_id": "other/1", "image": None, "question": "?"}])


def test_few_images_are_decoded():
    """A training's test split may have thousands."""

    class Lazy(dict):
        def __missing__(self, column):
            decoded.append(self["sample_id"])
            return Image.new("L", (4, 5))

    decoded = []
    samples = make_samples(40)
    lazy = [Lazy({name: value for name, value in one.items() if name != "image"}) for one in samples]
    assert draw_choices(make_table(samples=samples), lazy) is not None
    assert len(decoded) == 8


def test_what_cannot_be_drawn_is_refused(tmp_path):
    table = make_table()
    with pytest.raises(ValueError, match="the request table has no rows"):
        plot_sweep_pictures(table.select([]), tmp_path)
    with pytest.raises(ValueError, match="there is no column `accuracy`"):
        plot_sweep_pictures(table.remove_columns("accuracy"), tmp_path)
    with pytest.raises(ValueError, match="no policy 'guarded'"):
        draw_knob_shares(table, "guarded")
    with pytest.raises(ValueError, match="no columns of knobs"):
        draw_knob_shares(table.remove_columns(SPACE.names))
    with pytest.raises(ValueError, match="the summary has no rows"):
        draw_accuracy_latency(summarize(table, None).select([]))
    assert list(tmp_path.iterdir()) == []

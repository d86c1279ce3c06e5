import dataclasses
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from jaxrl_llm.plots import landscape, style
from tests.plots.test_tree import assert_legible

ROOT = Path(__file__).resolve().parents[2]
PATH = {"label": "check_points $t$", "points": [[-0.8, 0.7], [-0.3, 0.2], [0, 0]]}


def make_surface(rows=21, columns=21, *, rim=60.0, holes=0, **fields):
    """A bowl with a steep rim: no symmetry, so that no transposed or mirrored picture passes for it."""

    def loss(alpha, beta):
        rise = 3 * (alpha + 0.05) ** 2 + 5 * (beta - 0.04) ** 2 + 1.4 * alpha**3 + 2 * alpha * beta
        return 4.1 + rise + rim * np.maximum(0, alpha**2 + beta**2 - 0.5) ** 2

    alphas, betas = np.linspace(-1, 1, rows), np.linspace(-1, 1, columns)
    values = loss(*np.meshgrid(alphas, betas, indexing="ij"))
    rows_of = [[float(value) for value in row] for row in values]
    for hole in range(holes):
        rows_of[-1 - hole // columns][-1 - hole % columns] = None
    finite = [value for row in rows_of for value in row if value is not None]
    about = {"title": "random_directions $", "cosine": 3e-4, "sharpness": 12.3} | fields
    about |= {"minimum": min(finite, default=0.0), "maximum": max(finite, default=0.0), "centre": float(loss(0, 0))}
    return {"alphas": alphas.tolist(), "betas": betas.tolist(), "loss": rows_of} | about | fields


def tilted(rows, columns):
    """A plane: loss = 10 + 10 alpha + beta."""
    alphas, betas = np.linspace(-1, 1, rows), np.linspace(-2, 2, columns)
    loss = 20 + 10 * alphas[:, None] + betas[None, :]
    return {"alphas": alphas.tolist(), "betas": betas.tolist(), "loss": loss.tolist(), "centre": 20.0}


def drawn_3d(surface, **options):
    with style.look():
        axes = Figure(figsize=(4, 4)).add_subplot(projection="3d")
        colours = landscape.draw_surface(axes, surface, **options)
    return axes, colours


def drawn(surface, **options):
    with style.look():
        axes = Figure(figsize=(4, 4)).add_subplot()
        colours = landscape.draw_contour(axes, surface, **options)
    return axes, colours


def pixels(axes, points):
    """The colours, 0 to 255, in the middle of the pixels at these data points."""
    figure = axes.get_figure()
    with style.look():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    image = np.asarray(canvas.buffer_rgba())
    at = np.round(axes.transData.transform(points)).astype(int)
    return image[image.shape[0] - 1 - at[:, 1], at[:, 0], :3].astype(int)


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def corners(axes):
    (faces,) = [each for each in axes.collections if isinstance(each, Poly3DCollection)]
    return np.asarray(faces._faces, float)


@pytest.mark.parametrize("shape", [(5, 5), (4, 7)])
def test_alpha_is_x_and_beta_is_y(shape):
    """Square grids too, where a transposed picture has the right size."""
    surface = tilted(*shape)
    axes, colours = drawn(surface)
    points = np.array([(-0.8, -1.0), (0.8, -1.0), (-0.8, 1.0), (0.8, 1.0)])
    losses = 20 + 10 * points[:, 0] + points[:, 1]
    expected = 255 * colours.cmap(colours.norm(losses))[:, :3]
    np.testing.assert_allclose(pixels(axes, points), expected, atol=12)
    axes, _ = drawn_3d(surface)
    seen = corners(axes).reshape(-1, 3)
    np.testing.assert_allclose(seen[:, 2], 20 + 10 * seen[:, 0] + seen[:, 1])
    assert axes.get_xlabel().startswith("direction 1")
    assert axes.get_ylabel().startswith("direction 2")


def test_a_surface_of_large_range_is_on_a_log_scale_and_says_so():
    surface = make_surface()
    axes, colours = drawn_3d(surface)
    assert isinstance(colours.norm, LogNorm)
    assert axes.get_zlabel() == "loss, log scale\n(nats per token)"
    heights = 10 ** corners(axes)[..., 2]
    assert (heights.min(), heights.max()) == pytest.approx((surface["minimum"], surface["maximum"]))
    axes, colours = drawn_3d(make_surface(rim=0.0))
    assert type(colours.norm) is Normalize
    assert axes.get_zlabel() == "loss\n(nats per token)"


def test_the_origin_is_marked_at_its_own_loss():
    """On an even grid, that misses it, too."""
    for rows, note in [(21, "origin: 4.115"), (20, "origin: 4.115, between grid points")]:
        surface = make_surface(rows, rows)
        axes, _ = drawn_3d(surface)
        (mark,) = [line for line in axes.lines if line.get_marker() == "o"]
        position = [float(each[0]) for each in mark.get_data_3d()]
        assert position == pytest.approx([0, 0, np.log10(surface["centre"])])
        assert [text.get_text() for text in axes.texts] == ["4.115 at the origin"]
        axes, _ = drawn(surface)
        assert legend(axes)[0] == note
        (mark,) = [line for line in axes.lines if line.get_marker() == "o"]
        assert np.column_stack(mark.get_data()).tolist() == [[0, 0]]


def test_the_lowest_point_of_the_grid_is_marked():
    surface = make_surface(9, 15)
    row, column = np.unravel_index(np.argmin(surface["loss"]), (9, 15))
    axes, _ = drawn(surface)
    (mark,) = [line for line in axes.lines if line.get_marker() == "D"]
    expected = [[surface["alphas"][row], surface["betas"][column]]]
    assert np.column_stack(mark.get_data()).tolist() == expected
    assert legend(axes)[1] == f"lowest of the grid: {surface['minimum']:.4g}"
    assert legend(drawn(tilted(5, 5))[0])[1] == "lowest of the grid: 8.000, at its edge"


def test_holes_are_left_open_and_counted():
    surface = tilted(5, 5)
    surface["loss"][3][1] = None
    surface["loss"][1][3] = float("inf")
    axes, colours = drawn(surface)
    assert legend(axes)[-1] == "no finite loss: 2 of 25 points"
    at, mirrored = [(0.5, -1.0), (-0.5, 1.0)], [(0.5, 1.0), (-0.5, -1.0)]
    losses = [20 + 10 * alpha + beta for alpha, beta in mirrored]
    np.testing.assert_allclose(pixels(axes, mirrored), 255 * colours.cmap(colours.norm(losses))[:, :3], atol=12)
    spread = np.ptp(pixels(axes, at), axis=1)
    assert (spread < 20).all(), "hatching is grey on white"
    faces = landscape._faces(landscape.read_grid(surface))
    seen = {tuple(corner) for face in faces for corner in face[:, :2].tolist()}
    assert len(seen) == 23
    assert not seen & {(0.5, -1.0), (-0.5, 1.0)}
    assert "finite" not in "".join(legend(drawn(make_surface())[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": [[None] * 5 for _ in range(5)]}, "at least one loss must be finite, but none of 25 is"),
        ({"alphas": [], "loss": []}, "alphas must be at least 2 numbers, but are 0"),
        ({"betas": [], "loss": [[]] * 5}, "betas must be at least 2 numbers, but are 0"),
        ({"alphas": [0.0], "loss": [[1.0] * 5]}, "but are 1; one row of a grid is drawn as a section"),
        ({"loss": [[1.0] * 5] * 4}, r"5 x 5 \(alphas x betas\), but is 4 x 5"),
        ({"loss": [[1.0] * 5] * 4 + [[1.0] * 3]}, "but is 5 x 3 or 5"),
        ({"alphas": [0, 1, 1, 2, 3]}, "alphas must be finite and ascending, but are 0, 1, 1, 2, 3"),
        ({"centre": None}, "the loss at the origin must be a finite number, but is None"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields, message):
    for draw in (drawn, drawn_3d):
        with pytest.raises(ValueError, match=message):
            draw(tilted(5, 5) | fields)
    with pytest.raises(ValueError, match=message):
        landscape.landscape_figure(make_surface(5, 5) | fields, model="tiny")


def test_a_field_that_is_missing_is_named():
    surface = make_surface()
    del surface["centre"]
    with pytest.raises(ValueError, match="lacks centre"):
        drawn(surface)
    surface = make_surface()
    del surface["cosine"]
    with pytest.raises(ValueError, match="must have title and cosine for its figure, but lacks cosine"):
        landscape.landscape_figure(surface, model="tiny")


def test_equal_limits_give_equal_scales():
    several = [make_surface(), make_surface(20, 20, rim=1.0), make_surface(holes=3)]
    limits = landscape.loss_limits(several)
    norms = [draw(surface, limits=limits)[1].norm for surface in several for draw in (drawn, drawn_3d)]
    assert {(type(norm), norm.vmin, norm.vmax) for norm in norms} == {(LogNorm, *limits)}
    own = [drawn(surface)[1].norm for surface in several]
    assert own[0].vmax != own[1].vmax
    with pytest.raises(ValueError, match="limits must be two finite losses, the lower first, but are 5 and 4"):
        drawn(several[0], limits=(5, 4))


@pytest.mark.parametrize(
    ("limits", "extend"), [((1, 500), "neither"), ((4.5, 500), "min"), ((1, 20), "max"), ((4.5, 30), "both")]
)
def test_limits_that_cut_are_said_to_cut(limits, extend):
    surface = make_surface()
    for axes, colours in (drawn(surface, limits=limits), drawn_3d(surface, limits=limits)):
        bar = landscape.add_colour_bar(axes, colours)
        assert bar.extend == extend
        assert ("beyond the scale" in bar.ax.get_ylabel()) == (extend != "neither")
        assert "log scale" in bar.ax.get_ylabel()
    heights = 10 ** corners(drawn_3d(surface, limits=limits)[0])[..., 2]
    assert heights.min() == pytest.approx(max(limits[0], surface["minimum"]))
    assert heights.max() == pytest.approx(min(limits[1], surface["maximum"]))


def test_a_shared_colour_bar_speaks_for_every_panel():
    within, beyond = make_surface(rim=0.0), make_surface()
    limits = landscape.loss_limits([within])
    with style.look():
        figure = Figure()
        panels = figure.subplots(1, 2)
        colours = [landscape.draw_contour(*pair, limits=limits) for pair in zip(panels, (within, beyond), strict=True)]
        assert landscape.add_colour_bar(panels, colours).extend == "max"
        other = landscape.draw_contour(panels[0], within, limits=(0, 1))
        with pytest.raises(ValueError, match="must have the same limits, but have"):
            landscape.add_colour_bar(panels, [*colours, other])


def test_losses_that_are_not_positive_end_the_scale_at_a_percentile():
    surface = make_surface(rim=0.0, centre=-1.0)
    surface["loss"][0][0] = 1e6
    low, high = landscape.loss_limits([surface])
    assert low == -1
    assert high < 20
    assert drawn(surface)[1].cmap.colorbar_extend == "max"


def test_a_flat_surface_can_be_drawn():
    surface = make_surface(5, 5) | {"loss": [[2.0] * 5] * 5, "centre": 2.0, "minimum": 2.0, "maximum": 2.0}
    assert_legible(landscape.landscape_figure(surface, model="tiny"))


def test_ticks_are_round_and_within_the_scale():
    np.testing.assert_array_equal(landscape.ticks(landscape.loss_norm((4.0, 130.0))), [6, 10, 15, 25, 40, 50, 80])
    for limits in [(0.01, 4000.0), (-3, 7), (4.0, 4.002), (1e-6, 1e6)]:
        norm = landscape.loss_norm(limits)
        values = landscape.ticks(norm)
        assert len(values) >= 3
        assert (np.diff(values) > 0).all()
        assert limits[0] < values[0]
        assert values[-1] < limits[1]


def test_paths_run_over_the_contours_from_start_to_end():
    far = {"label": "far", "points": [[-3, 0.5], [0, 2]]}
    axes, _ = drawn(make_surface(), paths=[PATH, far])
    assert [text for text in legend(axes) if "start" in text] == [
        "check_points $t$ (○ start, ■ end)",
        "far (○ start, ■ end)",
    ]
    lines = {(line.get_marker(), tuple(map(tuple, np.column_stack(line.get_data())))) for line in axes.lines}
    assert ("None", tuple(map(tuple, PATH["points"]))) in lines
    assert ("o", ((-0.8, 0.7),)) in lines
    assert ("s", ((0, 0),)) in lines
    assert (axes.get_xlim(), axes.get_ylim()) == ((-3, 1), (-1, 2)), "a path that leaves the grid is seen whole"
    for points in ([], [[1, 2, 3]], [[0, float("nan")]]):
        with pytest.raises(ValueError, match="finite pairs"):
            drawn(make_surface(), paths=[{"label": "x", "points": points}])


def make_section(curvature=2.0, **fields):
    alphas = np.linspace(-1, 1, 11)
    section = {"label": "random_$1$", "alphas": alphas.tolist(), "curvature": curvature, "sharpness": 310.0}
    section["loss"] = (4 + 0.5 * curvature * alphas**2 + alphas**4).tolist()
    return section | {"quadratic": (4 + 0.5 * curvature * alphas**2).tolist()} | fields


def drawn_sections(sections, **options):
    with style.look():
        axes = Figure().add_subplot()
        landscape.draw_section(axes, sections, **options)
    return axes


def test_a_section_has_its_quadratic_in_its_colour():
    axes = drawn_sections([make_section(), make_section(1.0, label="other", sharpness=None)])
    lines = [line for line in axes.lines if len(line.get_xdata()) == 11]
    colours, dashed = [line.get_color() for line in lines], [line.get_linestyle() != "-" for line in lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert dashed == [False, True, False, True]
    np.testing.assert_allclose(lines[1].get_ydata(), make_section()["quadratic"])
    assert legend(axes) == [
        "random_$1$: curvature 2, sharpness 310",
        "other: curvature 1",
        "predicted by gradient and Hessian",
    ]


def test_the_height_of_a_section_follows_the_loss():
    axes = drawn_sections([make_section(quadratic=(4 + 1e4 * np.linspace(-1, 1, 11) ** 2).tolist())])
    assert axes.get_yscale() == "linear"
    assert 3.5 < axes.get_ylim()[0] < 4
    assert 6 < axes.get_ylim()[1] < 7
    axes = drawn_sections([make_section(300.0)])
    assert axes.get_yscale() == "log"
    assert axes.get_ylabel() == "loss (nats per token), log scale"
    assert drawn_sections([make_section()], limits=(0, 20)).get_ylim()[1] > 20


def test_gaps_of_a_section_are_counted():
    section = make_section()
    section["loss"][:2] = None, float("nan")
    section["quadratic"][0] = None
    axes = drawn_sections([section])
    assert "no finite loss at 2 of 11 points" in legend(axes)[0]
    assert np.isnan(axes.lines[0].get_ydata()).tolist() == [True, True] + [False] * 9


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([], "must be at least one section to draw, but there is none"),
        ([{"label": "x"}], "lacks alphas, loss, quadratic, curvature"),
        ([make_section(loss=[1.0])], "11 alphas must have as many values"),
        ([make_section(loss=[None] * 11)], "at least one loss must be finite, but none of 11 is"),
        ([make_section(alphas=[0.0])], "alphas must be at least 2 numbers, but are 1"),
    ],
)
def test_sections_that_cannot_be_drawn_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        drawn_sections(sections)


CASES = {
    "odd": make_surface(),
    "even": make_surface(20, 20),
    "wide": make_surface(21, 31, holes=70),
    "linear": make_surface(rim=0.0),
    "tiny": make_surface(2, 2),
    "long": make_surface(5, 5, title="a very long title " * 30),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_the_figure_is_legible(name):
    assert_legible(landscape.landscape_figure(CASES[name], model="tiny_gpt$2$", paths=[PATH]))


def test_labels_of_contour_lines_keep_apart_and_off_the_path():
    path = np.column_stack([np.linspace(-0.9, 0.9, 30)] * 2)
    axes, _ = drawn(make_surface(rim=300.0), paths=[{"label": "diagonal", "points": path.tolist()}])
    with style.look():
        canvas = FigureCanvasAgg(axes.get_figure())
        canvas.draw()
        (lines,) = [each for each in axes.collections if isinstance(each, ContourSet) and not each.filled]
        boxes = np.array([text.get_window_extent(canvas.get_renderer()).extents for text in lines.labelTexts])
        page = axes.get_window_extent().extents
    segments = sum(len(line) > 0 for level in lines.allsegs for line in level)
    assert 3 <= len(boxes) < segments, "some lines have no room for a label, or the test tests nothing"
    shared = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    assert not np.triu((shared > 0).all(axis=-1), k=1).any()
    assert (boxes[:, :2] >= page[:2]).all()
    assert (boxes[:, 2:] <= page[2:]).all()
    at = axes.transData.transform(path)[:, None]
    assert not ((at >= boxes[:, :2]) & (at <= boxes[:, 2:])).all(axis=-1).any(), "a label lies under the path"


@pytest.mark.parametrize(
    "limits", [(100.0, 100.04), (3.8845, 3.8851), (3.884812, 3.8848131), (1e4, 1e4 + 0.5), (1, 50)]
)
def test_ticks_are_told_apart_by_as_many_digits_as_they_need(limits):
    at = landscape.ticks(landscape.loss_norm(limits))
    labels = [landscape.digits(each, among=at) for each in at]
    assert len(set(labels)) == len(at) >= 4 and all(
        float(label) == pytest.approx(each) for label, each in zip(labels, at, strict=True)
    )
    assert landscape.digits(3.5, among=(3.5, 3.5)) == "3.5", "equal numbers need no more digits"


def test_a_figure_of_nearly_equal_losses_labels_them_apart():
    surface = make_surface()
    loss = np.asarray(surface["loss"])
    surface |= {"loss": (100 + 0.04 * (loss - loss.min()) / np.ptp(loss)).tolist(), "centre": 100.001}
    figure = landscape.landscape_figure(surface)
    figure.draw_without_rendering()
    for axes in figure.axes:
        scales = [axes.get_yticklabels(), getattr(axes, "get_zticklabels", list)()]
        for labels in ([each.get_text() for each in scale if each.get_text()] for scale in scales):
            assert len(set(labels)) == len(labels)
    assert "highest 100.04" in figure.texts[1].get_text()


@pytest.mark.parametrize(
    ("value", "short", "padded"),
    [
        (3.7, "3.7", "3.700"),
        (0.0001187, "1.187×10⁻⁴", "1.187×10⁻⁴"),
        (7.6e-5, "7.6×10⁻⁵", "7.600×10⁻⁵"),
        (-12345.0, "−1.234×10⁴", "−1.234×10⁴"),
        (1234.4, "1234", "1234"),
        (0, "0", "0.000"),
        (9999.6, "1×10⁴", "1.000×10⁴"),
    ],
)
def test_numbers_have_one_format(value, short, padded):
    assert (landscape.digits(value), landscape.digits(value, padded=True)) == (short, padded)


def test_the_facts_stand_under_the_title():
    title, facts = [text.get_text() for text in landscape.landscape_figure(make_surface(holes=3), model="tiny").texts]
    assert title == "random_directions $, tiny"
    for fact in ("origin 4.115", "lowest 4.", "highest 1", "cosine of the directions 3×10⁻⁴", "sharpness 12.3"):
        assert fact in facts
    assert facts.endswith("sharpness 12.3")  # the legend counts the holes
    crowded = {"centre": 123.41, "cosine": -1.234e-10, "sharpness": 1.234e5, "residuals": (3.321e-8, 1.234e4)}
    facts = landscape.landscape_figure(make_surface(**crowded)).texts[1].get_text()
    assert facts.endswith(", sharpness 1.234×10⁵ (not converged: residuals 3.3×10⁻⁸ and 1.2×10⁴)")


def test_saving_again_gives_the_same_bytes(tmp_path):
    surface = make_surface(7, 6, holes=2)
    first, again = (
        style.save_as(landscape.landscape_figure(surface, model="tiny"), tmp_path / f"{name}.svg").read_bytes()
        for name in ("first", "again")
    )
    assert first == again


def test_a_grid_is_read_once_and_not_changed():
    surface = make_surface(5, 4, holes=1)
    grid = landscape.read_grid(surface)
    assert grid.loss.shape == (5, 4)
    assert (grid.holes, grid.has_origin) == (1, False)
    assert surface["loss"][-1][-1] is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.centre = 0.0


def test_faces_of_four_and_of_three_corners():
    surface = tilted(3, 3)
    surface["loss"][0][0] = None
    sizes = sorted(len(face) for face in landscape._faces(landscape.read_grid(surface)))
    assert sizes == [3, 4, 4, 4]

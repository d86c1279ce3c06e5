import io
import itertools
import math
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image, ImageChops

from figures import search_trees
from jaxrl_llm.plots import charts, style
from jaxrl_llm.plots import tree as trees

ROOT = Path(__file__).resolve().parents[2]
NASTY = ["$", "$x_1^2$", "\n\n", " ", "", "\ufffd", " antidisestablishmentarianism", "中文", "🎉", "a\u0301", "\u200b"]
NASTY += ["\\frac{", "_", "^", "\t", "\x00", "\ud800", "ا", " dream", ".", '"', "<|endoftext|>", "%s", "W" * 16]


def make_tree(*, depth=5, branching=2, missing=0.0, ending=0.0, seed=0, prompt="I have a dream", name="full"):
    rng = random.Random(seed)
    nodes = [_node(0, None, 0, prompt, 1.0, 0.0, None)]
    front = nodes[:]
    for level in range(1, depth + 1):
        parents, front = front, []
        for parent in parents:
            for branch in range(branching):
                if (branch == 0 or rng.random() >= missing) and not parent["ended"]:
                    prob = rng.uniform(0.2, 0.6) if branch == 0 else 10 ** rng.uniform(-6, -0.8)
                    total = parent["total"] + math.log(prob)
                    token = NASTY[len(nodes) % len(NASTY)] if branching > 1 else rng.choice(NASTY)
                    front.append(_node(len(nodes), parent["id"], level, token, prob, total, total / level))
                    front[-1]["ended"] = rng.random() < ending
                    nodes.append(front[-1])
    best = max((node for node in nodes if node["level"] == depth or node["ended"]), key=lambda node: node["score"])
    path = [best["id"]]
    while nodes[path[0]]["parent"] is not None:
        path.insert(0, nodes[path[0]]["parent"])
    words = "".join(nodes[node]["text"] for node in path[1:])
    return {"name": name, "title": f"A {name}_tree, $k$ = 2", "nodes": nodes, "best": path} | {
        "best_text": words * 8,
        "best_score": best["score"],
    }


def _node(node, parent, level, token, prob, total, score):
    entry = {"id": node, "parent": parent, "level": level, "text": token, "prob": prob, "log_prob": math.log(prob)}
    return entry | {"score": score, "ended": False, "total": total}


def make_bars(kept):
    probs = [0.4 * 0.7**rank for rank in range(25)]
    tokens = [
        {"text": NASTY[rank % len(NASTY)], "prob": prob, "kept": rank < kept, "drawn": rank in (0, 4)}
        for rank, prob in enumerate(probs)
    ]
    return {"title": f"first {kept} of $V$", "kept_mass": sum(probs[:kept]), "tokens": tokens}


def make_results():
    chain = make_tree(branching=1, name="greedy")
    others = [make_tree(), make_tree(missing=0.1, ending=0.1, name="top_k"), make_tree(missing=0.5, name="nucleus")]
    panels = [make_bars(25), make_bars(20), make_bars(3)]
    data = {"model": "a_model $n$", "prompt": "I have a dream", "trees": [*others, chain], "bars": panels}
    return {"holds": True, "data": data | {"leaves": 32, "gains": [0.4, 0.0, 0.7, 0.1, 0.0, 0.2]}}


def texts(figure: Figure):
    """Every text that is drawn."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += axes.texts
        found += axes.get_legend().get_texts() if axes.get_legend() else []
        labelled = axes.axison and axes.name != "3d"  # 3-D labels stand where they are drawn
        for axis in (axes.xaxis, axes.yaxis) if labelled else ():
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=False)
            found += [label for at, label in ticks if low <= at <= high]  # others are not drawn
            found.append(axis.label)
    return [each for each in found if each.get_visible() and each.get_text()]


def assert_legible(figure: Figure):
    """All text is on the page, none touches another, and drawing warns of nothing (such as a missing glyph)."""
    with warnings.catch_warnings(), style.look():
        warnings.simplefilter("error")
        canvas = FigureCanvasAgg(figure)
        if figure.get_layout_engine():
            figure.draw_without_rendering()  # the layout settles in the second
        canvas.draw()
        drawn = texts(figure)
        boxes = np.array([each.get_window_extent(canvas.get_renderer()).extents for each in drawn])
    low, high = boxes[:, :2], boxes[:, 2:]
    shared = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    overlapping = np.triu((shared > 0.01).all(axis=-1), k=1)
    assert not overlapping.any(), [[drawn[index].get_text() for index in pair] for pair in np.argwhere(overlapping)]
    assert (low >= 0).all()
    assert (high <= [figure.bbox.width, figure.bbox.height]).all()


@pytest.mark.parametrize("shape", [{}, {"branching": 1}, {"missing": 0.5, "ending": 0.2}, {"branching": 3, "depth": 3}])
@pytest.mark.slow
def test_labels_of_a_tree_figure_do_not_overlap(shape):
    assert_legible(trees.tree_figure(make_tree(**shape), model="gpt_2 $"))


def test_labels_of_a_colour_bar_are_apart():
    for low, high in ((-3.53, -1.34), (-12.9, -10.2), (0.01, 0.27)):
        figure = trees.tree_figure(make_tree(), norm=Normalize(low, high))
        FigureCanvasAgg(figure).draw()
        axis = figure.axes[1].xaxis
        at = [low <= place <= high for place in axis.get_majorticklocs()]
        boxes = [label.get_window_extent() for label, kept in zip(axis.get_ticklabels(), at, strict=True) if kept]
        points = 72 / figure.dpi
        assert min((right.x0 - left.x1) * points for left, right in itertools.pairwise(boxes)) > 3


@pytest.mark.slow
def test_labels_of_the_whole_figure_do_not_overlap():
    assert_legible(search_trees.draw(make_results()))


@pytest.mark.parametrize("prompt", ["", "a very long prompt\n" * 500, "中文" * 50], ids=["empty", "long", "escaped"])
def test_any_prompt_fits(prompt):
    assert_legible(trees.tree_figure(make_tree(depth=2, prompt=prompt)))


def test_bars_do_not_overlap():
    panels = [make_bars(25), make_bars(5)]
    sheet = style.Sheet(420, charts.needed_height(panels) + 20)
    with style.look():
        charts.draw_panels(sheet, 10, 10, panels, width=400, height=charts.needed_height(panels))
    assert_legible(sheet.figure)


def test_bars_of_many_nodes_are_in_rows_at_one_scale():
    panels = [make_bars(kept) | {"title": f"{kept}: {'a long text ' * 9}"} for kept in (25, 5, 3)]
    figure = charts.bars_figure(panels, title="nucleus", columns=2)
    assert_legible(figure)
    assert len({round(axes.get_xlim()[1], 9) for axes in figure.axes}) == 1
    tops = [round(axes.get_position().y1, 6) for axes in figure.axes]
    assert tops[0] == tops[1] > tops[2]
    for wrong, said in (([], "at least 1 distribution"), (panels * 40, "1 to .* distributions")):
        with pytest.raises(ValueError, match=f"a figure must have {said}, but is given {len(wrong)}"):
            charts.bars_figure(wrong)


def test_nodes_have_the_colour_of_their_score_or_of_their_probability():
    tree = make_tree(depth=2)
    colours = {}
    for color, values in (
        ("score", [node["score"] for node in tree["nodes"][1:]]),
        ("probability", [node["prob"] for node in tree["nodes"][1:]]),
    ):
        figure = trees.tree_figure(tree, color=color)
        norm, cmap = trees.score_norm([tree], color=color), style.score_colours()
        assert (norm.vmin, norm.vmax) == (min(values), max(values))
        fills = [patch.get_facecolor() for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
        assert fills[0] == (1, 1, 1, 1), "the prompt"
        placed = list(trees.place(tree).boxes)
        expected = [cmap(norm(dict(zip(range(1, 7), values, strict=True))[node])) for node in placed[1:]]
        np.testing.assert_allclose(fills[1:], expected)
        assert figure.axes[1].get_xlabel() == trees.SCALES[color]
        colours[color] = fills
    assert colours["score"] != colours["probability"]
    with pytest.raises(ValueError, match="color must be one of score, probability, but is 'level'"):
        trees.tree_figure(tree, color="level")


@pytest.mark.parametrize("size", [(3, 2), (12, 9)])
def test_a_tree_shrinks_into_the_axes_it_is_given(size):
    with style.look():
        figure = Figure(figsize=size)
        tree = make_tree(depth=4)
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        trees.draw_tree(axes, tree, norm=trees.score_norm([tree]), cmap=style.score_colours())
    assert_legible(figure)


def test_every_label_is_inside_its_box():
    tree = make_tree(missing=0.3, ending=0.1)
    figure = trees.tree_figure(tree)
    axes = figure.axes[0]
    with style.look():
        FigureCanvasAgg(figure).draw()
        for box in trees.place(tree, width=trees.place(tree).width).boxes.values():
            inside = [each for each in axes.texts if each.get_position()[1] == box.y and each.get_text() == box.label]
            extents = [each.get_window_extent().transformed(axes.transData.inverted()) for each in inside]
            assert any(box.x < extent.x0 and extent.x1 < box.right for extent in extents)


def test_a_parent_stands_between_its_children_and_the_likelier_child_above():
    tree = make_tree(missing=0.2)
    placed = trees.place(tree, width=900)
    assert placed.width == 900
    for node, children in placed.children.items():
        heights = [placed.boxes[child].y for child in children]
        probs = [placed.nodes[child]["prob"] for child in children]
        assert heights == sorted(heights)
        assert probs == sorted(probs, reverse=True)
        if heights:
            assert placed.boxes[node].y == pytest.approx((heights[0] + heights[-1]) / 2)


def test_what_is_not_one_tree_is_refused():
    tree = make_tree(depth=2)
    for parent, message in [(99, "parent 99"), (None, "but has 2"), (3, "reachable")]:
        broken = tree | {"nodes": [node | {"parent": parent} if node["id"] == 3 else node for node in tree["nodes"]]}
        with pytest.raises(ValueError, match=message):
            trees.place(broken)


def test_a_deep_chain_needs_no_recursion():
    assert len(trees.place(make_tree(depth=3000, branching=1)).boxes) == 3001


LABELS = {" dream": "·dream", " ": "␣", "": "∅", "\n\n": "↵↵", "$": "$", "a b ": "a·b·", "\ufffd": "\ufffd"}
LABELS |= {
    "中": "\\u4e2d",
    "a\u0301": "a\u0301",
    "\u0301": "\\u0301",
    " \u0301": "·\\u0301",
    "\u200b": "\\u200b",
    "\ud800": "\\ud800",
    "\x00": "\\x00",
}


@pytest.fixture
def own_font(monkeypatch):
    """No fonts but ours, as on a machine without fonts of other scripts."""
    monkeypatch.setattr(style, "_other_families", list)
    style._is_drawn.cache_clear()
    yield
    style._is_drawn.cache_clear()


@pytest.mark.parametrize(("token", "label"), LABELS.items())
def test_token_labels(own_font, token, label):
    assert style.token_label(token, size=7, width=100) == label


def test_what_to_install_for_other_scripts_is_said_once(own_font):
    style._say_what_to_install.cache_clear()
    with pytest.warns(
        UserWarning, match=r"no installed font has them: Noto Sans .* fonts-noto-core and fonts-noto-cjk"
    ):
        style.token_label("中", size=7, width=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert style.token_label("文\U000f0000", size=7, width=100) == "\\u6587\\U000f0000"


def test_characters_of_other_fonts_are_drawn_in_them(tmp_path, monkeypatch):
    """Of one that comes with matplotlib; ours stays the first, so that other texts look the same everywhere."""
    monkeypatch.setattr(style, "_other_families", lambda: ["cmr10", "STIXGeneral"])
    monkeypatch.setattr(style, "FAMILIES", ["DejaVu Sans"])
    monkeypatch.setitem(style.LITERAL, "family", style.FAMILIES)
    style._is_drawn.cache_clear()
    character = chr(
        min(code for code in style._characters("STIXGeneral") - style._characters("DejaVu Sans") if chr(code).isalpha())
    )
    assert style.token_label(f"a{character}", size=7, width=100) == f"a{character}"
    assert style.FAMILIES == ["DejaVu Sans", "STIXGeneral"]
    tree = make_tree(depth=1)
    tree["nodes"][1]["text"] = character
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of missing glyphs
        style.save_as(trees.tree_figure(tree), tmp_path / "tree.png")
    style._is_drawn.cache_clear()


def test_repeated_labels_are_numbered():
    assert style.told_apart(["a", "b", "a", "c", *"a" * 9]) == [
        "a₁",
        "b",
        "a₂",
        "c",
        *(f"a{n}" for n in "₃₄₅₆₇₈₉"),
        "a₁₀",
        "a₁₁",
    ]


def test_long_text_is_cut_between_symbols(own_font):
    assert style.token_label("中" * 9, size=7, width=60) == "\\u4e2d\\u4e2d…"
    assert style.sentence("one two three", size=7, width=40, keep_end=True) == "…wo three"
    assert style.text_width(style.sentence("x" * 10**6, size=7, width=50), 7) <= 50


@pytest.mark.parametrize(
    ("probability", "label"),
    [(0.152, "15.2%"), (0.0286, "2.9%"), (0.003, "0.30%"), (1e-9, "<0.01%"), (0.0, "0.00%"), (1.0, "100%")],
)
def test_per_cent(probability, label):
    assert style.per_cent(probability) == label


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_saving_again_gives_the_same_bytes(tmp_path, suffix):
    tree = make_tree(depth=3)
    first, again = (
        style.save_as(trees.tree_figure(tree), tmp_path / folder / f"tree.v1{suffix}", source="digest").read_bytes()
        for folder in ("a", "b")
    )
    assert first == again
    assert b"digest" in first, "the picture says what it was drawn from"
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"tree.v1{suffix}"]


def test_a_png_has_a_palette_where_no_pixel_changes_visibly(tmp_path):
    drawn, noise = trees.tree_figure(make_tree(depth=3)), Figure(figsize=(1, 1))
    noise.figimage(np.random.default_rng(0).random((180, 180, 3)))
    for figure, mode in ((drawn, "P"), (noise, "RGBA")):
        full = io.BytesIO()
        with style.look():
            figure.savefig(full, format="png")
        with (
            Image.open(style.save_as(figure, tmp_path / "it.png", source="digest")) as saved,
            Image.open(full) as whole,
        ):
            assert saved.mode == mode and saved.text["Source"] == "digest" and saved.info["dpi"] == whole.info["dpi"]
            extremes = ImageChops.difference(saved.convert("RGB"), whole.convert("RGB")).getextrema()
            assert max(high for _, high in extremes) <= style.CLOSE * (mode == "P")
    figure.patch.set_alpha(0)
    figure.images.clear()
    with Image.open(style.save_as(figure, tmp_path / "it.png")) as saved:
        assert saved.convert("RGBA").getextrema()[3] == (0, 0)


def test_a_suffix_that_matplotlib_does_not_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the suffix must be one of"):
        style.save_as(trees.tree_figure(make_tree(depth=3)), tmp_path / "tree.xyz")


def test_the_look_leaves_the_users_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    trees.tree_figure(make_tree(depth=1))
    assert dict(matplotlib.rcParams) == before


def test_importing_plots_imports_nothing_heavy():
    code = "import sys, jaxrl_llm.plots; assert not {'jax', 'matplotlib', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

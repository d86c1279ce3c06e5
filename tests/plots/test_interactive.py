import json
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_llm.plots.interactive import surface_html
from tests.plots.test_landscape import ROOT, make_surface, tilted


@pytest.fixture(scope="module", autouse=True)
def plotly():
    return pytest.importorskip("plotly")


def read(page):
    """The data and the layout that the page gives to plotly.js."""
    call = page[page.rindex("Plotly.newPlot(") :]
    data, end = json.JSONDecoder().raw_decode(call, call.index("["))
    layout, _ = json.JSONDecoder().raw_decode(call, call.index("{", end))
    return data, layout


def test_alpha_is_x_and_beta_is_y():
    """Rows of z run along y."""
    for shape in [(5, 5), (4, 7)]:
        data, _ = read(surface_html([tilted(*shape)], title="t"))
        x, y = np.meshgrid(data[0]["x"], data[0]["y"])
        np.testing.assert_allclose(data[0]["z"], 20 + 10 * x + y)
        assert "direction 1 %{x" in data[0]["hovertemplate"]
        assert "direction 2 %{y" in data[0]["hovertemplate"]
        assert "loss %{z" in data[0]["hovertemplate"]


def test_plotly_accepts_what_the_page_says(plotly):
    import plotly.graph_objects

    data, layout = read(surface_html([make_surface(), make_surface(holes=4)], title="t"))
    plotly.graph_objects.Figure({"data": data, "layout": layout})  # refuses unknown fields and values
    with pytest.raises(ValueError, match="hovertemplatte"):
        plotly.graph_objects.Figure({"data": [data[0] | {"hovertemplatte": ""}]})


def test_holes_stay_open():
    surface = tilted(5, 4)
    surface["loss"][3][1] = None
    surface["loss"][0][2] = float("inf")
    (drawn, _), _ = read(surface_html([surface], title="t"))
    holes = [(row, column) for row in range(4) for column in range(5) if drawn["z"][row][column] is None]
    assert holes == [(1, 3), (2, 0)]
    assert drawn["connectgaps"] is False
    assert drawn["surfacecolor"][1][3] is None


def test_the_origin_is_marked_at_its_loss_on_an_even_grid_too():
    surface = make_surface(20, 20)
    (_, origin), _ = read(surface_html([surface], title="t"))
    assert (origin["x"][0], origin["y"][0], origin["z"][0]) == (0, 0, surface["centre"])
    assert "4.115 at the origin" in origin["text"]


def test_a_menu_shows_one_surface_at_a_time():
    data, layout = read(surface_html([make_surface(title=name) for name in "abc"], title="t"))
    (menu,) = [menu for menu in layout["updatemenus"] if menu["type"] == "dropdown"]
    assert [button["label"] for button in menu["buttons"]] == ["a", "b", "c"]
    assert [trace["visible"] for trace in data] == [True, True, False, False, False, False]
    assert menu["buttons"][2]["args"] == [{"visible": [False, False, False, False, True, True]}]
    _, layout = read(surface_html([make_surface()], title="t"))
    assert [menu["type"] for menu in layout["updatemenus"]] == ["buttons"]


def test_the_scale_is_switched_for_height_and_colour():
    surface = make_surface()
    data, layout = read(surface_html([surface], title="t"))
    (menu,) = layout["updatemenus"]
    linear, log = menu["buttons"]
    assert (menu["active"], layout["scene"]["zaxis"]["type"]) == (1, "log"), "as the static figure of this surface"
    for button, scale, colours in ((linear, "linear", data[0]["z"]), (log, "log", np.log10(data[0]["z"]))):
        changed, axis, which = button["args"]
        assert axis["scene.zaxis.type"] == scale
        assert which == [0]
        np.testing.assert_allclose(changed["surfacecolor"][0], colours)
    bar = log["args"][0]["colorbar"][0]
    np.testing.assert_allclose([float(text) for text in bar["ticktext"]], 10 ** np.array(bar["tickvals"]))
    _, layout = read(surface_html([make_surface(rim=0.0)], title="t"))
    assert (layout["updatemenus"][0]["active"], layout["scene"]["zaxis"]["type"]) == (0, "linear")


def test_losses_that_are_not_positive_have_no_log_scale():
    surface = make_surface(5, 5)
    surface["loss"][2][2] = 0.0
    _, layout = read(surface_html([make_surface(), surface], title="t"))
    assert [menu["type"] for menu in layout["updatemenus"]] == ["dropdown"]
    assert layout["scene"]["zaxis"]["type"] == "linear"


def test_the_page_needs_nothing_else():
    page = surface_html([make_surface()], title="t")
    assert len(page) > 10**6, "plotly.js is in the page"
    assert len(page) < 6 * 10**6
    own = re.sub(r"<script\b[^>]*>.*?</script>", lambda script: script[0][: script[0].index(">") + 1], page, flags=re.S)
    assert not re.search(r"(src|href)\s*=|@import|url\(", own)
    assert page.count("<script") >= 2


def test_words_of_others_stay_words():
    nasty = "</script><script>alert(1)</script>"
    page = surface_html([make_surface(title=nasty), make_surface(title="b")], title=nasty)
    assert nasty not in page
    assert "<h1>&lt;/script&gt;" in page


@pytest.mark.slow
def test_equal_surfaces_give_equal_bytes():
    """In another process too."""
    page = surface_html([tilted(4, 3)], title="t")
    assert page == surface_html([tilted(4, 3)], title="t")
    code = (
        "import hashlib; from jaxrl_llm.plots.interactive import surface_html; "
        "from tests.plots.test_landscape import tilted; "
        "print(hashlib.sha256(surface_html([tilted(4, 3)], title='t').encode()).hexdigest())"
    )
    command = [sys.executable, "-c", code]
    digests = {
        subprocess.run(
            command, check=True, cwd=ROOT, capture_output=True, text=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in "12"
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("surfaces", "message"),
    [
        ([], "must be at least one surface to draw, but there is none"),
        (
            [tilted(3, 3), tilted(3, 3) | {"loss": [[None] * 3] * 3}],
            "at least one loss must be finite, but none of 9 is",
        ),
        ([tilted(3, 3) | {"alphas": [], "loss": []}], "but are 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(surfaces, message):
    with pytest.raises(ValueError, match=message):
        surface_html(surfaces, title="t")


def test_without_plotly_one_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxrl_llm\[interactive\]'") as raised:
        surface_html([tilted(3, 3)], title="t")
    assert raised.value.name == "plotly"


def test_plotly_is_imported_only_where_it_is_needed():
    code = "import sys, jaxrl_llm.plots.interactive; assert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

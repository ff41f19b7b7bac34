"""The explorer: every figure of a model, in a page that loads nothing; its filters and its cards in a browser."""

import json
import re
import shutil

import pytest
from click.testing import CliRunner

from terrazzo.errors import InputError
from terrazzo.tools import results
from terrazzo.tools.models import registered_models
from terrazzo.tools.reports import cards, choice, explorer
from terrazzo.tools.verbs.explore import command

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


@pytest.fixture(scope="module")
def points():
    return explorer.points()


@pytest.fixture
def without_plotly(tmp_path, monkeypatch):
    """A script of one line in place of Plotly's."""
    script = tmp_path / "plotly.min.js"
    script.write_text("const Plotly = {};")
    monkeypatch.setattr(explorer, "_plotly", lambda: script)


def test_every_count_and_every_time_is_there(points):
    counted = {(point["model"], point["metric"]) for point in points if point["runtime"] == "counted"}
    titles = [title for title, _ in explorer.COUNTED.values()]
    assert counted == {(model, title) for model in registered_models() for title in titles}
    rows = results.read(results.FOLDER / "dinat_runtimes_cpu.csv")
    found = [point for point in points if point["what"] == "dinat_runtimes"]
    assert [point["value"] for point in found] == [row.p50 for row in rows]
    assert {point["size"] for point in found} == {"224x224", "512x512"}
    assert "onnxruntime, float32" in {point["runtime"] for point in found}


def test_accuracies_are_published_ones(points):
    accuracies = {point["model"]: point["top1"] for point in points}
    assert accuracies["dinat_mini"] == 81.8
    assert accuracies["m3vit_tiny"] is None


def test_the_front_leaves_out_what_another_beats():
    def point(model, value, top1):
        return {"model": model, "value": value, "top1": top1}

    found = choice.front(
        [point("a", 2, 80), point("b", 1, 80), point("c", 3, 82), point("d", 4, 81), point("e", 1, None)]
    )
    assert [item["model"] for item in found] == ["b", "c"]


def test_tables_of_choice():
    for kind in ("front parameters", "front multiply-adds", "times"):
        text = cards.render(f"<!-- table: {kind} -->\n<!-- end of table -->")
        assert len(text.splitlines()) > 8, kind


def test_the_page_has_everything_inside(tmp_path, without_plotly):
    done = CliRunner().invoke(command, ["--out", str(tmp_path / "page.html")], standalone_mode=False)
    assert done.exception is None
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", text.split("<script>")[0])
    values, _ = json.JSONDecoder().raw_decode(text.partition("const values = ")[2])
    assert len(values["points"]) > 300
    assert set(values["cards"]) == {point["family"] for point in values["points"]}
    assert "<h1>NAT, DiNAT" in values["cards"]["dinat"]
    assert text.count("</script>") == 2, "data ended a script"
    assert not re.search(r"<script|<img|<a ", "".join(values["cards"].values()))


def test_without_plotly(monkeypatch):
    monkeypatch.setattr(explorer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="plotly, which is not installed; install it with: pip install"):
        explorer.page()


@pytest.mark.slow
def test_in_a_browser(tmp_path):
    """A filter, a list and a click, in Chromium."""
    pytest.importorskip("plotly", reason="needs the extra 'explore'")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    path = tmp_path / "page.html"
    path.write_text(explorer.page("cards/{}/"))
    asked, errors = [], []
    with playwright.sync_playwright() as started:
        page = started.chromium.launch(executable_path=browser, args=QUIET).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#plot .points path")
        everything = int(page.inner_text("#note").split()[0])
        page.click("#none")
        assert page.inner_text("#note").startswith("0 figures")
        page.check("#families input[value=dinat]")
        assert 0 < int(page.inner_text("#note").split()[0]) < everything
        page.click("#all")
        page.select_option("#metric", "forward, ms")
        page.select_option("#runtime", "onnxruntime, float32")
        assert "onnxruntime" in page.inner_text("#note")
        box = page.locator("#plot .points path").first.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(300)  # Plotly finds the point under the mouse a moment later
        page.mouse.down()
        page.mouse.up()
        page.wait_for_selector("dialog[open]")
        model = page.inner_text("#title")
        assert page.get_attribute("#page", "href") == f"cards/{registered_models()[model]}/"
        assert model in page.inner_text("#text")
        page.click("#close")
        assert page.locator("dialog[open]").count() == 0
    assert asked == [path.as_uri()]
    assert not errors

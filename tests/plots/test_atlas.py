"""The page of an atlas, in a browser without network."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from simclr_ddp.plots.atlas import Groups, Scores, page, picture_side
from tests.support import browser
from tests.support.browser import Browser

COUNT, SIDE = 1_100, 16  # more than fit on one sheet
CLASSES = ["cat", "<b>dog</b>", "$data", "déjà vu"]
MAPS = {"t-SNE": 3 * np.random.default_rng(1).normal(size=(COUNT, 2)), "PCA": np.arange(2 * COUNT).reshape(COUNT, 2)}


def pictures() -> np.ndarray:
    """Smooth pictures of distinct colours: uint8 [COUNT, SIDE, SIDE, 3]."""
    colours = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 2, 3), dtype=np.uint8)
    return np.stack([np.array(Image.fromarray(c).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for c in colours])


def neighbours() -> np.ndarray:
    return (np.arange(COUNT)[:, None] + np.array([7, 1, 500])) % COUNT


def html(**changed: Any) -> str:
    given: dict[str, Any] = {
        "maps": MAPS,
        "pictures": pictures(),
        "colourings": [
            Groups("class", CLASSES, np.arange(COUNT) % 4, searchable=True),
            Scores("sharpness", np.linspace(-2, 5, COUNT)),
            Groups("cluster", ["cluster 1", "cluster 2"], np.arange(COUNT) // 600),
        ],
        "neighbours": neighbours(),
        "cosines": np.tile([0.9, 0.5, -0.25], (COUNT, 1)),
        "numbers": np.arange(COUNT) + 5_000,
        "names": [f"train/<i>{i:04d}</i>.jpg" for i in range(COUNT)],
        "title": "Atlas",
        "subtitle": "1,100 images of a </script> set",
    }
    return page(**(given | changed))


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_sheets_hold_every_picture_in_its_cell() -> None:
    data, expected = data_of(html()), pictures()
    assert len(data["sheets"]) == 2 and data["columns"] == 32
    for i in (0, 31, 32, 1_023, 1_024, COUNT - 1):
        encoded = data["sheets"][i // 1_024].removeprefix("data:image/jpeg;base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as sheet:
            row, column = divmod(i % 1_024, 32)
            cell = np.asarray(sheet)[row * SIDE :, column * SIDE :][:SIDE, :SIDE]
        assert np.abs(cell.astype(int) - expected[i]).mean() < 4


def test_maps_keep_their_shape() -> None:
    for drawn in data_of(html())["maps"]:
        points = np.frombuffer(base64.b64decode(drawn["points"]), "<u2").reshape(COUNT, 2).astype(float)
        given = MAPS[drawn["name"]]
        scale = 65535 / np.ptp(given, axis=0).max()
        np.testing.assert_allclose(points, (given - (given.min(0) + given.max(0)) / 2) * scale + 32767.5, atol=0.51)


def test_pictures_get_smaller_where_there_are_many() -> None:
    assert [picture_side(count, 500) for count in (2_000, 10_000, 50_000)] == [64, 40, 32]
    assert [picture_side(2_000, largest) for largest in (20, 32, 33)] == [24, 32, 40]


def test_nothing_but_the_script_of_the_page_may_run_and_nothing_be_loaded() -> None:
    text = html()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    script, style = re.search(r"<script>(.*?)</script>", text, re.S), re.search(r"<style>(.*?)</style>", text, re.S)
    assert policy and script and style
    hashes = [base64.b64encode(sha256(found[1].encode()).digest()).decode() for found in (style, script)]
    assert policy[1] == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
    )
    assert text.count("<script") == text.count("</script") == 2 and "<i>0001" not in text
    assert len(script[1].splitlines()) <= 300
    assert html() == text, "the same page again"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if browser.MISSING:
        pytest.skip(browser.MISSING)
    with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(chromium: Browser, tmp_path: Path) -> Browser:
    return open_page(chromium, tmp_path, html())


def open_page(chromium: Browser, folder: Path, text: str) -> Browser:
    (folder / "atlas.html").write_text(text, "utf-8")
    chromium.requests()
    chromium.open(folder / "atlas.html")
    chromium.wait("return fitted && sheets.every((sheet) => sheet.complete)")
    return chromium


def point(opened: Browser, i: int) -> tuple[float, float]:
    """Where image i is in the window."""
    left, top = opened.run("const box = canvas.getBoundingClientRect(); return [box.left, box.top]")
    x, y = opened.run(f"return [x({i}) / devicePixelRatio, y({i}) / devicePixelRatio]")
    return left + x, top + y


def alone(opened: Browser) -> int:
    """An image whose point no other point is near, when all are shown."""
    at = np.array(opened.run(f"return Array.from({{ length: {COUNT} }}, (_, i) => [x(i), y(i)])"))
    gaps = np.linalg.norm(at[:, None] - at, axis=2) + np.diag(np.full(COUNT, np.inf))
    return int(gaps.min(1).argmax())


def shown(opened: Browser, canvas: str) -> np.ndarray:
    """Pixels of a canvas of the page: uint8 [height, width, 3]."""
    encoded = opened.run(f"return document.querySelector('{canvas}').toDataURL()").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        return np.array(picture.convert("RGB"))


def pixel(opened: Browser, i: int) -> np.ndarray:
    """The colour where image i is on the map, int [3]."""
    column, row = opened.run(f"draw(); return [Math.round(x({i})), Math.round(y({i}))]")
    return shown(opened, "#map")[row, column].astype(int)


def is_picture(found: np.ndarray, i: int) -> bool:
    return found.shape == (SIDE, SIDE, 3) and bool(np.abs(found.astype(int) - pictures()[i]).mean() < 4)


def texts(opened: Browser, selector: str) -> list[str]:
    found: list[str] = opened.run(f"return Array.from(document.querySelectorAll('{selector}'), (e) => e.innerText)")
    return found


def test_hover_shows_the_image_and_leaving_hides_it(opened: Browser) -> None:
    i = alone(opened)
    assert not opened.run("return $('hover').checkVisibility()")
    opened.pointer(*point(opened, i))
    opened.wait("return hovered >= 0")
    assert opened.run("return hovered") == i and opened.run("return $('hover').checkVisibility()")
    assert is_picture(shown(opened, "#preview"), i) and not is_picture(shown(opened, "#preview"), i - 1)
    assert texts(opened, "#name") == [f"train/<i>{i:04d}</i>.jpg · class: {CLASSES[i % 4]}"]
    opened.pointer(1, 1)
    opened.wait("return hovered < 0")
    assert not opened.run("return $('hover').checkVisibility()")


def test_a_click_lists_the_neighbours_and_a_neighbour_can_be_clicked(opened: Browser) -> None:
    i = alone(opened)
    opened.pointer(*point(opened, i), click=True)
    opened.wait("return selected >= 0")
    assert is_picture(shown(opened, "#picture"), i)
    value = np.linspace(-2, 5, COUNT)[i]
    facts = [f"train/<i>{i:04d}</i>.jpg", f"number {i + 5_000}", f"class: {CLASSES[i % 4]}", f"sharpness: {value:.3g}"]
    assert texts(opened, "#facts span")[:4] == facts
    expected = neighbours()[i].tolist()
    listed = [line.split("\n") for line in texts(opened, "#neighbours li")]
    assert [name for name, _ in listed] == [f"train/<i>{j:04d}</i>.jpg" for j in expected]
    cosines = ("0.900", "0.500", "-0.250")
    assert [note for _, note in listed] == [
        f"class: {CLASSES[j % 4]}, cosine {c}" for j, c in zip(expected, cosines, strict=True)
    ]
    assert is_picture(shown(opened, "#neighbours li:nth-child(3) canvas"), expected[2])
    opened.run("document.querySelector('#neighbours li:nth-child(2) button').focus()")
    opened.keys("\ue007")  # Enter
    opened.wait(f"return selected === {expected[1]}")
    assert texts(opened, "#facts span")[0] == f"train/<i>{expected[1]:04d}</i>.jpg"
    opened.keys("\ue00c")  # Escape
    opened.wait("return selected < 0")


def test_no_class_covers_the_others(chromium: Browser, tmp_path: Path) -> None:
    """Images i and i + half lie on one point, and the later is on top, whatever its class."""
    half = COUNT // 2
    i = np.arange(COUNT)
    points = np.stack([i % half % 30, i % half // 30], 1)
    of_class = Groups("class", ["one", "two"], (i + i // half) % 2)
    text = html(maps={"PCA": points}, colourings=[of_class])
    opened = open_page(chromium, tmp_path, text)
    one, other = (np.median([pixel(opened, i) for i in range(first, 60, 2)], axis=0) for first in (0, 1))
    assert np.abs(one - other).max() > 50


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0042", lambda i: i == 42),
        ("DÉJÀ", lambda i: i % 4 == 3),
        ("5107", lambda i: i == 107),
        ("$data", lambda i: i % 4 == 2),
        ("nothing such", lambda i: False),
    ],
)
def test_search_finds_names_classes_and_numbers(opened: Browser, text: str, found: Callable[[int], bool]) -> None:
    expected = [i for i in range(COUNT) if found(i)]
    opened.run("$('search').focus()")
    opened.keys(text)
    opened.wait("return matches !== null")
    assert sorted(opened.run("return [...matches]")) == expected
    listed = [line.split("\n")[0] for line in texts(opened, "#found li")]
    assert listed == [f"train/<i>{i:04d}</i>.jpg" for i in expected[:50]]
    (count,) = texts(opened, "#count")
    assert count.startswith(f"{len(expected):,} of 1,100 images")
    opened.keys("\ue007")
    opened.wait(f"return selected === {expected[0] if expected else -1}")


def test_points_have_the_colours_of_the_legend(opened: Browser) -> None:
    assert texts(opened, "#legend li") == [f"{name} (275)" for name in CLASSES]
    i, grey = alone(opened), np.array([0xDF, 0xE3, 0xE9])
    colour = np.array([[0x3F, 0x90, 0xDA], [0xFF, 0xA9, 0x0E], [0xBD, 0x1F, 0x01], [0x94, 0xA4, 0xA2]][i % 4])
    seen = 0.85 * colour + 0.15 * 255  # points are translucent
    assert np.abs(pixel(opened, i) - seen).max() <= 2
    assert (shown(opened, f"#legend li:nth-child({i % 4 + 1}) canvas")[16, 16] == colour).all()
    for value, expected in ((i % 4, seen), ((i + 1) % 4, grey), ((i + 1) % 4, seen)):
        opened.run(f"$('legend').children[{value}].firstChild.click()")
        assert np.abs(pixel(opened, i) - expected).max() <= 2
    assert opened.run("return Array.from($('legend').children, (e) => e.firstChild.ariaPressed)") == ["false"] * 4
    opened.run("$('colour').value = 1; $('colour').onchange()")
    assert texts(opened, "#ends span") == ["-2", "5"] and not texts(opened, "#legend li")
    step = matplotlib.colormaps["viridis"](i / (COUNT - 1))[:3]
    assert np.abs(pixel(opened, i) - (0.85 * 255 * np.array(step) + 0.15 * 255)).max() <= 8


def test_zooming_keeps_the_place_and_shows_pictures(opened: Browser) -> None:
    i = alone(opened)
    before = opened.run(f"return [x({i}), y({i})]")
    opened.run(f"zoom(60, {before[0]}, {before[1]})")
    assert opened.run(f"return [x({i}), y({i})]") == pytest.approx(before, abs=0.01)
    assert np.abs(pixel(opened, i) - pictures()[i][SIDE // 2, SIDE // 2]).max() < 25
    opened.run("canvas.focus()")
    opened.keys("0")
    opened.wait(f"return scale === whole() && Math.abs(x({i}) - {before[0]}) < 0.01")
    opened.keys("n")
    opened.wait("return selected >= 0")
    opened.keys("\ue014")  # to the right: the map moves to the left
    opened.wait(f"return Math.abs(x({i}) - {before[0]} + 60 * devicePixelRatio) < 0.01")


def test_the_other_map_is_chosen_by_name(opened: Browser) -> None:
    assert texts(opened, "#projection option") == ["t-SNE", "PCA"]
    opened.run("$('projection').value = 1; $('projection').onchange()")
    along = np.array(opened.run(f"return Array.from({{ length: {COUNT} }}, (_, i) => [x(i), y(i)])"))
    assert (np.diff(along[:, 0]) >= 0).all() and (np.diff(along[:, 1]) <= 0).all(), "a line that rises"


def test_no_request_leaves_the_page(chromium: Browser, tmp_path: Path) -> None:
    opened = open_page(chromium, tmp_path, html())
    opened.pointer(*point(opened, 3), click=True)
    addresses = [url for url in opened.requests() if not url.startswith(("data:", "chrome"))]
    assert addresses == [(tmp_path / "atlas.html").as_uri()] and not opened.messages()
    opened.run("new Image().src = 'https://example.org/x.png'; fetch('https://example.org/').catch(() => 0)")
    refused = opened.messages()
    assert len(refused) >= 2 and all("Content Security Policy" in message for message in refused), refused


def test_images_without_names(chromium: Browser, tmp_path: Path) -> None:
    score = [Scores("same everywhere", np.ones(COUNT))]
    opened = open_page(chromium, tmp_path, html(names=None, colourings=score, maps={"PCA": MAPS["PCA"]}))
    opened.run("select(3)")
    assert texts(opened, "#facts span") == ["image 5003", "number 5003", "same everywhere: 1"]
    assert "Search by number" in texts(opened, "aside")[0] and not opened.messages()

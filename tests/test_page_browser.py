"""The page's script, run in a real browser on a small run whose every value was set by hand.

Each tile of each sheet has a colour of its own, so that a colour that is seen tells which photo,
filter or channel is shown. Nothing here needs TensorFlow.
"""

import base64
import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import record
from chromium import Page, find_chromium
from PIL import Image

PAGE = Path(__file__).parents[1] / "Images" / "index.html"
CLASSES = ["daisy", "rose", "tulip"]
CHROMIUM = find_chromium()
WINDOW = 1280, 1000
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


# ---- A small run ---------------------------------------------------------------------------------


def tile_colour(sheet, k):
    """A colour for each tile of sheets 0, 1, …, each far from the others."""
    n = 16 * sheet + k + 1
    return (53 * n) % 200 + 40, (97 * n + 60) % 200 + 40, (151 * n + 20) % 200 + 40


def write_sheet(folder, file, sheet, count, columns, tile=40, gap=0, border=0, title=0):
    """Write a sheet of tiles in its own colours on white, and return how the page cuts it."""
    pitch = tile + 2 * gap
    rows = -(-count // columns)
    width = 2 * border + columns * pitch
    height = title + 2 * border + rows * pitch
    pixels = np.full((height, width, 3), 255, "uint8")
    left, top = border + gap, title + border + gap
    for k in range(count):
        y, x = top + k // columns * pitch, left + k % columns * pitch
        pixels[y : y + tile, x : x + tile] = tile_colour(sheet, k)
    Image.fromarray(pixels).save(folder / file)
    place = {"left": left, "top": top, "tile": tile, "pitch": pitch, "columns": columns}
    return {"file": file, "width": width, "height": height} | place


def encoded(rows):
    return base64.b64encode(np.array(rows, "uint8").tobytes()).decode()


def heatmap(class_index, *layers, against=None):
    """The entry of a class from its (peak, rows of bytes) at each layer.

    against: the same of what speaks against the class; nothing does where it is left out.
    """
    peaks, maps = zip(*layers, strict=True)
    against_peaks, against_maps = zip(
        *(against or [(0, 0 * np.array(it)) for it in maps]), strict=True
    )
    return {
        "class": class_index,
        "peaks": peaks,
        "maps": [encoded(rows) for rows in maps],
        "against_peaks": against_peaks,
        "against": [encoded(rows) for rows in against_maps],
    }


# What each says, most probable first. Photo 4 is the visitor's own; 8 only lends patches.
PHOTOS = [
    # name, true class, probabilities, doubt, width / height
    ("rose/a.jpg", 1, [[1, 0.91], [0, 0.06], [2, 0.03]], 0.9, 1.5),
    ("daisy/b.jpg", 0, [[1, 0.8], [0, 0.15], [2, 0.05]], -0.8, 1),
    ("daisy/c.jpg", 0, [[1, 0.6], [2, 0.3], [0, 0.1]], -0.6, 1),
    ("rose/d.jpg", 1, [[0, 0.696], [1, 0.208], [2, 0.096]], -0.7, 0.5),
    ("own.jpg", None, [[2, 0.95], [1, 0.04], [0, 0.01]], 0.95, 1),
    ("tulip/e.jpg", 2, [[2, 0.55], [0, 0.3], [1, 0.15]], 0.55, 1),
    ("tulip/f.jpg", 2, [[2, 0.995], [1, 0.005], [0, 0.0]], 0.995, 1),
    ("daisy/g.jpg", 0, [[0, 0.4], [1, 0.35], [2, 0.25]], 0.4, 1),
    ("daisy/h.jpg", 0, [[0, 1.0], [1, 0.0], [2, 0.0]], 1.0, 2),
]
COUNTS = [[2, 2, 0], [1, 1, 0], [0, 0, 2]]
LAYERS = [
    {"layer": "fine", "positions": [3, 5], "start": [0.2, 0.1], "step": [0.25, 0.2]},
    {"layer": "coarse", "positions": [2, 3], "start": [0.3, 0.25], "step": [0.5, 0.2]},
]
LAYERS = [layer | {"size": [0.5, 0.3]} for layer in LAYERS]
ROSE = [[0, 51, 102], [153, 255, 204]]  # coarse, on photo 0, of 2.5; the finer one of 5
DAISY = [[255, 0, 0], [0, 0, 51]]  # of 5
FINE_ROSE = [[0, 0, 0, 0, 51], [0, 255, 0, 0, 0], [0, 0, 102, 0, 0]]
FINE_DAISY = [[255, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
FIELD = {
    "layer": "activation_5",
    "positions": [4, 8],
    "start": [0.14, 0.09],
    "step": [0.24, 0.12],
    "size": [0.4, 0.2],
}
# Of filters 0 to 3: photo, row, column, activation.
PATCHES = [
    [[6, 1, 3, 9.5], [0, 2, 4, 7.25], [8, 0, 7, 3.0]],
    [[3, 3, 0, 4.0], [1, 0, 2, 3.0]],
    [],
    [[5, 1, 1, 2.0], [6, 2, 6, 1.5]],
]
PEAKS = [[6.5, 1.25, 0.0, 1.0], [2.0, 3.5, 0.0, 0.5]]  # of photos 0 and 1
SELECTIVITY = [1.5, 2.5, -1, 2.0]
# Of photo 1 without each of 2 × 2 places: bytes of rose, daisy and tulip.
COVERED = [[204, 38, 13], [51, 179, 25], [102, 77, 76], [255, 0, 0]]
# For photos 1 and 6: [class, [[training photo, cosine], …]]
LIKE = {1: [[1, [[2, 0.93], [0, 0.91]]], [0, [[3, 0.5]]]], 6: [[2, [[1, 0.999]]]]}
TRAINING = ["rose/x.jpg", "tulip/y.jpg", "rose/z.jpg", "daisy/w.jpg"]
# Bins of confidence: photos, their mean confidence, how many are right.
BINS = [[0, 0, 0]] * 3 + [[1, 0.4, 1], [3, 0.6, 1], [4, 0.925, 4]]
# For each concept its photos, strongest first, and [class, part, fall of the logit].
CONCEPTS = [
    {"photos": [3, 0, 8], "classes": [[1, 0.62, 4.5], [2, 0.3, 1.25]]},
    {"photos": [1, 2], "classes": []},
]
LIT = [[[255, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 255]]]  # where each lies, on all photos
COLOURS = [f"#{k:02x}{k // 2:02x}{255 - k:02x}" for k in range(256)]


def said(name, true_index, probabilities):
    """A sentence as the training script writes it."""
    (best, share), *_ = probabilities
    text = f"It says {CLASSES[best]}, {round(100 * share)} %"
    if true_index is None:
        return text
    return f"{text}, and is right" if best == true_index else f"{text}; it is {CLASSES[true_index]}"


def write_run(folder):
    """Write the sheets of the run and return what run.js is to hold."""
    thumbnails = write_sheet(folder, "photos.png", 0, 8, 3)
    photo_sheets = [
        write_sheet(folder, f"photos_{k + 1}.png", 1 + k, 4, 2, title=6 * k) for k in range(3)
    ]
    photos = []
    for number, (name, true_index, probabilities, doubt, ratio) in enumerate(PHOTOS):
        sheet, place = divmod(number, 4)
        best = probabilities[0][0]
        photos.append(
            {
                "number": number,
                "sheet": sheet,
                "place": place,
                "ratio": ratio,
                "listed": number < 8,
                "name": name,
                "verdict": said(name, true_index, probabilities),
                "own": true_index is None,
                "true": true_index,
                "mistake": true_index not in (best, None),
                "confidence": probabilities[0][1],
                "doubt": doubt,
                "probabilities": probabilities,
                "concepts": {
                    "maps": [encoded(rows) for rows in LIT],
                    "peaks": [2.0, 1.0],
                    "shares": [[k, [[k % 2, 0.7], [1 - k % 2, 0.2]]] for k in range(3)],
                },
                "heatmaps": [
                    heatmap(best, (1.5, DAISY)),
                    heatmap(probabilities[1][0], (0.75, ROSE)),
                ],
            }
        )
    photos[2]["heatmaps"].append(heatmap(0, (0.5, ROSE)))
    against_rose = [(0, np.zeros((3, 5))), (3.0, [[0, 0, 255], [0, 0, 0]])]
    rose = heatmap(1, (5.0, FINE_ROSE), (2.5, ROSE), against=against_rose)
    daisy = heatmap(0, (1.0, FINE_DAISY), (5.0, DAISY))
    photos[0] |= {"heatmaps": [rose, daisy], "worth": [[1, "Better for rose by 0.12."]]}
    all_of_daisy = {"class": 0, "map": encoded([[0, 51], [255, 0]]), "worth": "For daisy by 0.56."}
    photos[0]["all_blocks"] = all_of_daisy
    nothing = heatmap(0, (0, np.zeros((3, 5))), (0, np.zeros((2, 3))))
    photos[1] |= {"heatmaps": [rose | {"class": 1}, nothing]}
    photos[1]["worth"] = [[0, "A guess for daisy: 0.34."], [1, "Better for rose by 0.78."]]
    photos[1]["covered"] = encoded(COVERED)
    patterns = write_sheet(folder, "patterns.png", 4, 4, 3, gap=2, border=4, title=15)
    patterns |= {
        "count": 4,
        "silent": [2],
        "layer": "conv_5",
        "caption": "What filters look for\nrow by row",
    }
    filters = {"number": 5, "count": 9, "layer": "conv_5", "activation": "activation_5"}
    filters |= {"channels": 4, "sheets": [patterns], "field": FIELD}
    filters |= {
        "maps": write_sheet(folder, "maps.png", 5, 8, 4),
        "patches": PATCHES,
        "peaks": PEAKS,
        "selectivity": SELECTIVITY,
    }
    later = write_sheet(folder, "later.png", 6, 2, 2)
    later |= {"count": 2, "silent": [], "layer": "conv_7", "caption": "What later filters look for"}
    deeper = filters | {"number": 7, "sheets": [later], "patches": [[], []]}
    before = write_sheet(folder, "before.png", 7, 5, 3, gap=1)
    after = write_sheet(folder, "after.png", 8, 5, 3, gap=1)
    pair = [
        sheet | {"count": 5, "silent": silent, "layer": layer, "caption": f"{layer} for rose/a.jpg"}
        for sheet, silent, layer in ((before, [], "conv_1"), (after, [3], "activation_1"))
    ]
    channels = {"number": 1, "count": 9, "layer": "conv_1", "activation": "activation_1"}
    channels |= {"channels": 5, "sheets": pair}
    # Without an activation of its own.
    deep = write_sheet(folder, "deep.png", 10, 3, 3)
    deep |= {"count": 3, "silent": [], "layer": "conv_4", "caption": "conv_4 for rose/a.jpg"}
    deep_channels = channels | {"number": 4, "channels": 3, "sheets": [deep]}
    training = write_sheet(folder, "training.png", 11, 4, 2)
    for file in ("strip.jpg", "first.png", "training_curves.png"):
        write_sheet(folder, file, 9, 1, 1)
    return {
        "format": 5,
        "lead": ["It learnt 3 classes.", "It names 5 of 8 right."],
        "warnings": ["⚠ Only 2 photos of a class."],
        "command": "python model_training_and_visualization.py --epochs 2",
        "settings": ["epochs: 2", "weights: none"],
        "judged": "71 % of the heatmaps are better.",
        "classes": CLASSES,
        "test": [
            ["true \\ predicted", *CLASSES, "recall"],
            ["daisy", *COUNTS[0], "0.50"],
            ["rose", *COUNTS[1], "0.51"],
            ["tulip", *COUNTS[2], "1.00"],
            ["precision", "0.67", "0.33", "0.99", ""],
        ],
        "reliability": {"error": 0.123, "bins": BINS},
        "predictions": {"file": "predictions.csv"},
        "photo_count": 9,
        "places": 2,
        "all_blocks_side": 2,
        "concepts": {
            "truth": "2 concepts; with them alone 96 % keep their class",
            "found": CONCEPTS,
        },
        "training": {
            "count": 12,
            "sheet": training,
            "names": TRAINING,
            "like": [LIKE.get(number, []) for number in range(9)],
        },
        "photos": photos,
        "thumbnails": thumbnails,
        "photo_sheets": photo_sheets,
        "colours": COLOURS,
        "heatmap_layers": LAYERS,
        "filters": [filters, deeper],
        "channels": [channels, deep_channels],
        "pictures": [
            {"file": "first.png", "caption": "The first picture", "width": 40, "height": 40},
            {
                "file": "training_curves.png",
                "caption": "Loss of 2 epochs",
                "width": 300,
                "height": 100,
            },
        ],
    }


def write_script(folder, run):
    text = json.dumps(run).replace("<", "\\u003c")
    (folder / "run.js").write_text(f"const run = {text};\n", "utf-8")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    page = Page(CHROMIUM, tmp_path_factory.mktemp("profile"))
    page.resize(*WINDOW)
    yield page
    page.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the page and the small run, and what its run.js holds."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(PAGE, folder)
    run = write_run(folder)
    write_script(folder, run)
    return folder, run


@pytest.fixture
def visit(browser, site, tmp_path):
    """Opens the small run's page at an address: visit("photo=3"). Its console must stay silent.

    `change` alters a copy of the run first.
    """
    browser.problems.clear()

    def open_page(address="", change=None):
        if change is None:
            browser.open(site[0] / "index.html", address)
            return browser
        run = copy.deepcopy(site[1])
        change(run)
        for path in site[0].iterdir():
            shutil.copy(path, tmp_path)
        write_script(tmp_path, run)
        browser.open(tmp_path / "index.html", address)
        return browser

    yield open_page
    assert browser.problems == []


def test_the_scale_holds_what_speaks_against_a_class_too(visit):
    def strongly_against(run):
        run["photos"][0]["heatmaps"][0]["against_peaks"] = [0, 9.0]

    page = visit("photo=0", strongly_against)
    # Where daisy is 0 and rose 1 it is 9 against rose: 8 in all, more than any peak.
    scales = [re.findall(r"−?\d+", text) for text in page.texts("#panels .scale")]
    assert scales == [["0", "8"], ["0", "8"], ["−8", "8"]]


def test_the_scale_is_that_of_the_block_on_show(visit):
    def fine_is_weakest(run):
        run["photos"][0]["heatmaps"][0]["peaks"] = (0.5, 2.5)
        run["photos"][0]["heatmaps"][1]["peaks"] = (0.25, 5.0)

    page = visit("photo=0&block=fine", fine_is_weakest)
    scales = [re.findall(r"−?\d[.\d]*", text) for text in page.texts("#panels .scale")]
    assert scales == [["0", "0.5"], ["0", "0.5"], ["−0.5", "0.5"]]


def test_the_scale_is_one_for_all_classes_of_a_photo(visit):
    def three(run):
        entries = run["photos"][0]["heatmaps"]
        entries.append(entries[0] | {"class": 2, "peaks": (1.0, 7.0)})

    for compared in ("daisy", "tulip"):
        scales = visit(f"photo=0&class={compared}", three).texts("#panels .scale")
        assert [re.findall(r"−?\d+", text) for text in scales[:2]] == [["0", "7"]] * 2


def test_the_heatmap_of_all_blocks_is_one_of_its_own_with_its_own_worth(visit):
    page = visit("photo=0")
    assert facts(page.text("#worth")) == ["rose", "0.12"]
    page.click('#blocks input[value="all"]')
    assert address(page)["block"] == "all" and facts(page.text("#worth")) == ["daisy", "0.56"]
    assert explained(page) == [["daisy"]]
    assert page.text("#all-blocks-map .scale").split() == ["0", "1"]
    grid = "#all-blocks-map .positions [role=img]"
    assert [facts(text)[:2] for text in page.each(grid, "ariaLabel")] == [
        ["daisy", "0"],
        ["daisy", "0.2"],
        ["daisy", "1"],
        ["daisy", "0"],
    ]
    page.click("#thumbnails a:nth-child(1)")  # which has none
    assert "block" not in address(page) and len(explained(page)) > 1
    assert "0.56" not in page.text("#worth")


# ---- Concepts ------------------------------------------------------------------------------------


def test_the_evidence_for_both_classes_is_told_concept_by_concept(visit):
    page = visit("photo=0")  # it says rose; compared with daisy
    told = [facts(text) for text in page.each("#evidence a", "ariaLabel")]
    assert told == [
        ["1", "70", "rose"],
        ["0", "20", "rose"],
        ["0", "70", "daisy"],
        ["1", "20", "daisy"],
    ]
    widths = [box[2] for box in page.boxes("#evidence > :nth-child(1) a")]
    assert widths[0] > 1.5 * widths[1]
    page.point('#evidence a[href="#concept=0"]')
    assert facts(page.text("#evidence-text")) == ["0", "20", "rose"]
    page = visit("photo=1")  # which has an empty heatmap for daisy
    told = page.each("#evidence a", "ariaLabel")
    assert ["outweighed" in text for text in told] == ["daisy" in text for text in told]
    assert any("daisy" in text for text in told)


def test_evidence_is_outweighed_where_the_heatmap_of_the_last_layer_is_empty(visit):
    def empty(run):
        """At the first layer for rose, at the last for daisy."""
        rose, daisy = run["photos"][0]["heatmaps"]
        rose["peaks"], daisy["peaks"] = (0, 2.5), (1.0, 0)

    told = visit("photo=0", empty).each("#evidence a", "ariaLabel")
    outweighed = [text for text in told if "outweighed" in text]
    assert outweighed == [text for text in told if "daisy" in text] != []


def test_a_concept_is_lit_on_the_photo_and_leads_to_those_that_hold_most_of_it(visit):
    page = visit("photo=0")
    assert page.eval("document.querySelector('#concept').hidden")
    page.click('#evidence a[href="#concept=0"]')
    assert address(page)["concept"] == "0" and address(page)["photo"] == "0"
    bottom = "document.querySelector('#lit').getBoundingClientRect().bottom <= innerHeight"
    assert page.eval(bottom)
    told = page.text("#concept-text")
    assert facts(told) == ["0", "rose", "62", "4.5", "tulip", "30", "1.25"]
    # Photo 3, 0 itself not again, and 8, which cannot be chosen.
    assert page.each("#lit [role=img]", "ariaLabel") == names([0, 3, 8])
    assert page.each("#lit a", "hash") == ["#photo=3"]
    # Bright in the first row and column, dark in the last ones.
    every = "[...document.querySelectorAll('#lit canvas')]"
    data = page.eval(f"{every}.map((it) => [...it.getContext('2d').getImageData(0, 0, 5, 4).data])")
    for pixels in data:
        shade = np.array(pixels).reshape(4, 5, 4)[..., 3]
        assert shade[1, 1] == 0 and shade[2, 3] == shade[0, 0] == pytest.approx(217, abs=2)
    # A pixel for each of the 2 × 3 positions, and one more on each side.
    looks = LAYERS[1]
    for (x, y, w, h), frame in zip(
        page.boxes("#lit canvas"), page.boxes("#lit .frame"), strict=True
    ):
        left, top, width, height = frame
        start = [
            first - 1.5 * step for first, step in zip(looks["start"], looks["step"], strict=True)
        ]
        place = [left + start[1] * width, top + start[0] * height]
        place += [5 * looks["step"][1] * width, 4 * looks["step"][0] * height]
        assert [x, y, w, h] == pytest.approx(place, abs=1)
    page.click("#lit a")
    assert shown(page) == "rose/d.jpg" and address(page)["concept"] == "0"
    assert page.each("#lit [role=img]", "ariaLabel") == names([3, 0, 8])
    page.click('#evidence a[href="#concept="]')
    assert "concept" not in address(page)


def test_all_concepts_are_listed_with_their_classes_and_photos(visit):
    page = visit("concepts")
    assert "96" in facts(page.text("#truth"))
    assert len(page.texts("#all-concepts figure")) == 2
    assert page.each("#all-concepts [role=img]", "ariaLabel") == names([3, 0, 8, 1, 2])
    page.click('#all-concepts a[href="#concept=1"]')
    assert address(page)["concept"] == "1" and facts(page.text("#concept-text")) == ["1"]


def test_a_run_without_concepts_has_no_section_for_them(visit):
    def take_away(run):
        run["concepts"] = {"truth": "0 concepts", "found": []}
        for entry in run["photos"]:
            entry["concepts"] = {"maps": [], "peaks": [], "shares": [[k, []] for k in range(3)]}

    page = visit("photo=0&concept=1", take_away)
    assert page.eval("document.querySelector('#concepts').hidden")
    assert page.eval("document.querySelector('#concept').hidden")
    assert page.each("#evidence a", "hash") == [] and "concept=1" in page.text("#word")


# ---- What is seen --------------------------------------------------------------------------------


def listed(page):
    """The names of the photos to choose from, in order."""
    return [label.split(":")[0] for label in page.each("#thumbnails [role=img]", "ariaLabel")]


def names(numbers):
    return [PHOTOS[number][0] for number in numbers]


def shown(page):
    """The name of the photo on show."""
    return page.text("#verdict .note").strip()


def let_pictures_load(page):
    """Wait until all pictures are there, so that nothing moves any more."""
    page.eval("document.querySelectorAll('img').forEach((it) => { it.loading = 'eager'; })")
    page.wait("[...document.images].every((it) => it.complete)")


def facts(text):
    """The photos, classes, layers and numbers that a text names, in its order."""
    named = ["\\w+/\\w.jpg", *CLASSES, "fine", "coarse", "conv_\\d", "activation_\\d"]
    return re.findall("|".join([*named, r"−?\d+(?:\.\d+)?"]), text)


def explained(page):
    """The classes that the caption of each heatmap names."""
    return [facts(caption) for caption in page.texts("#panels figcaption")[1:]]


def numbers_in_title(page):
    """Those of the convolution and of the filter or channel that the dialog shows."""
    return sorted(map(int, facts(page.text("#title"))))


def address(page):
    return dict(page.eval("[...new URLSearchParams(location.hash.slice(1))]"))


def near(colour, expected, tolerance=4):
    return np.abs(np.subtract(colour, expected)).max() <= tolerance


def photo_colour(number):
    return tile_colour(1 + number // 4, number % 4)


# ---- Choosing a photo ----------------------------------------------------------------------------


def test_own_photos_come_first_then_the_most_doubtful(visit):
    page = visit()
    order = [4, 1, 3, 2, 7, 5, 0, 6]
    assert listed(page) == names(order)
    for colour, number in zip(page.colours("#thumbnails .tile"), order, strict=True):
        assert near(colour, tile_colour(0, number))
    assert "8 of 9 photos" in page.text("#count")


def test_photos_stand_in_the_order_that_is_chosen(visit):
    page = visit()
    orders = {
        "confidence": [4, 7, 5, 2, 3, 1, 0, 6],
        "true": [4, 1, 2, 7, 0, 3, 5, 6],
        "": [4, 1, 3, 2, 7, 5, 0, 6],
    }
    for order, expected in orders.items():
        page.choose("#order", order)
        assert listed(page) == names(expected)
        assert address(page).get("order", "") == order


def test_mistakes_and_photos_with_all_blocks_are_marked(visit):
    page = visit()
    marks = page.eval(
        "Object.fromEntries([...document.querySelectorAll('#thumbnails .tile')].map((it) =>"
        "[it.ariaLabel.split(':')[0], ['before', 'after'].map((side) =>"
        "getComputedStyle(it, '::' + side).content.replaceAll('\"', '')).join()]))"
    )
    starred, crossed = {0, 1}, {1, 2, 3}
    for number in range(8):
        star = "★" if number in starred else "none"
        cross = "✕" if number in crossed else "none"
        assert marks[PHOTOS[number][0]] == f"{star},{cross}"


def test_classes_choose_the_photos_of_the_list(visit):
    page = visit()
    page.choose("#true", "daisy")
    assert listed(page) == names([1, 2, 7])
    page.choose("#predicted", "rose")
    assert listed(page) == names([1, 2])
    assert "2 of 9 photos" in page.text("#count")
    page.choose("#true", "")
    assert listed(page) == names([1, 2, 0])
    assert page.each("#true option", "text") == ["any", *CLASSES]


def test_where_each_class_is_told_by_itself_all_from_a_half_up_are_predicted(visit):
    def change(run):
        run["multi_label"] = True
        run["photos"][3]["probabilities"][1][1] = 0.6  # rose, beside daisy's 0.696

    page = visit("predicted=rose", change)
    assert listed(page) == names([1, 3, 2, 0])
    page.choose("#predicted", "daisy")
    assert listed(page) == names([3])  # of photo 7 daisy is the most probable class, at 0.4


def test_each_count_of_the_confusion_matrix_leads_to_its_photos(visit):
    page = visit()
    rows = page.eval(
        "[...document.querySelectorAll('#confusion tr')].map((row) =>"
        "[...row.children].map((it) => it.innerText.trim()))"
    )
    assert rows[0] == ["true \\ predicted", *CLASSES, "recall"]
    assert rows[-1] == ["precision", "0.67", "0.33", "0.99", ""]
    assert [row[0] for row in rows[1:-1]] == CLASSES
    assert [row[-1] for row in rows[1:-1]] == ["0.50", "0.51", "1.00"]
    for true_index, counts in enumerate(COUNTS):
        for predicted, count in enumerate(counts):
            assert rows[true_index + 1][predicted + 1] == (str(count) if count else "·")
            if not count:
                continue
            # A filter that would leave none of them is taken back.
            page.choose("#result", "wrong" if true_index == predicted else "right")
            page.click(f"#confusion tr:nth-child({true_index + 2}) td:nth-child({predicted + 2}) a")
            found = [
                number
                for number, (_, true, probabilities, *_) in enumerate(PHOTOS[:8])
                if true == true_index and probabilities[0][0] == predicted
            ]
            assert sorted(listed(page)) == names(found)
            assert shown(page) == listed(page)[0]
            assert -1 < page.box("#count")[1] < page.box("#photo")[1] < 400
    assert "crossed" not in page.each("#thumbnails .tile", "className")[0]


# ---- A photo -------------------------------------------------------------------------------------


def test_a_photo_is_shown_with_what_the_model_says_of_it(visit):
    page = visit()
    for number in (4, 0, 3):
        name, _, probabilities, _, ratio = PHOTOS[number]
        page.click(f"#thumbnails [aria-label^='{name}']")
        (colour,) = page.colours("#photo .tile")
        assert near(colour, photo_colour(number))
        _, _, width, height = page.box("#photo .frame")
        assert width / height == pytest.approx(ratio, rel=0.01)
        assert name in page.text("#verdict")
        assert said(*PHOTOS[number][:3]) in page.text("#verdict").replace("\xa0", " ")
        assert ("✕" in page.text("#verdict")) == (number == 3)
        bars = [bar.split() for bar in page.texts("#bars .bar")]
        assert [bar[0] for bar in bars] == [CLASSES[k] for k, _ in probabilities]
        assert [bar[-2:] for bar in bars] == [[str(round(100 * p)), "%"] for _, p in probabilities]
        shares = page.each("#bars progress", "value")
        assert shares == pytest.approx([share for _, share in probabilities])
        current = page.each("#thumbnails [aria-current=true] .tile", "ariaLabel")
        assert [label.split(":")[0] for label in current] == [name]
        assert address(page)["photo"] == str(number)
        if number == 0:
            assert page.text("#worth") == "Better for rose by 0.12."
        elif number == 1:  # of the class that it says, and of the one compared
            told = ["Better for rose by 0.78.", "A guess for daisy: 0.34."]
            assert page.text("#worth").splitlines() == told
        else:
            assert "first 2 photos only" in page.text("#worth")


def test_a_class_without_a_heatmap_says_so_when_it_is_chosen(visit):
    page = visit("photo=0")
    facts = [page.each("#bars input", what) for what in ("value", "disabled", "checked")]
    # The predicted class is always shown; the others are compared with it.
    assert facts == [["rose", "daisy", "tulip"], [True, False, False], [False, True, False]]
    page.click("#bars input[value=tulip]")
    assert "no heatmap of this photo for tulip: daisy is shown" in page.text("#word")
    assert page.eval("document.querySelector('#bars :checked').value") == "daisy"
    assert address(page)["class"] == "daisy"


# ---- Its heatmap ---------------------------------------------------------------------------------


def open_panels(visit, asked="photo=0"):
    page = visit(asked)
    page.choose("#mix", "1")
    return page


@pytest.mark.parametrize(
    ("panel", "block", "layer", "rows", "peak"),
    [
        ("predicted", "", 1, ROSE, 2.5),
        ("compared", "coarse", 1, DAISY, 5),
        ("predicted", "fine", 0, FINE_ROSE, 5),
        ("compared", "fine", 0, FINE_DAISY, 1),
    ],
)
def test_a_heatmap_lies_where_its_positions_look(visit, panel, block, layer, rows, peak):
    page = open_panels(visit, f"photo=0&block={block}")
    name = {"predicted": "rose", "compared": "daisy"}[panel]
    looks = LAYERS[layer]
    left, top, width, height = page.box(f"#{panel}-map .frame")
    positions = f"#{panel}-map .positions [role=img]"
    labels = page.each(positions, "ariaLabel")
    boxes = page.boxes(positions)
    colours = page.colours(positions)
    boxes = page.boxes(positions)
    left, top, width, height = page.box(f"#{panel}-map .frame")
    places = [(row, column) for row in range(len(rows)) for column in range(len(rows[0]))]
    assert len(boxes) == len(places) == np.prod(looks["positions"])
    found = zip(places, labels, boxes, colours, strict=True)
    for (row, column), label, (x, y, w, h), colour in found:
        value = rows[row][column] / 255 * peak
        down = looks["start"][0] + row * looks["step"][0]
        across = looks["start"][1] + column * looks["step"][1]
        assert y + h / 2 == pytest.approx(top + down * height, abs=1)
        assert x + w / 2 == pytest.approx(left + across * width, abs=1)
        assert h == pytest.approx(looks["step"][0] * height, abs=1)
        assert w == pytest.approx(looks["step"][1] * width, abs=1)
        place = [str(row + 1), str(column + 1), looks["layer"]]
        assert facts(label) == [name, f"{value:g}", *place]
        k = round(255 * value / 5)  # 5 is the highest of both classes
        if 0 <= down <= 1 and 0 <= across <= 1:
            assert near(colour, (k, k // 2, 255 - k), 36)  # a peak is smoothed a little
    assert facts(page.text(f"#{panel}-map figcaption")) == [name]
    assert page.text(f"#{panel}-map .scale").split() == ["0", "5"]


def test_a_heatmap_fades_into_its_photo(visit):
    page = visit("photo=0")
    # Half of its lowest colour, over a photo that is grey.
    page.choose("#mix", "0.5")
    ((red, green, blue),) = page.colours("#predicted-map .positions span:first-child")
    assert abs(red - green) < 4 and 120 < blue - red < 135
    page.choose("#mix", "0")
    for panel in ("predicted", "compared", "difference"):
        (colour,) = page.colours(f"#{panel}-map .frame")
        assert near(colour, photo_colour(0))


def test_what_speaks_for_one_class_rather_than_another_is_their_difference(visit):
    page = open_panels(visit)
    assert facts(page.text("#difference-map figcaption")) == ["rose", "daisy"]
    assert page.text("#difference-map .scale").split() == ["−5", "5"]
    (low,), (high,) = (page.colours("#difference-map .gradient", 0.5, at) for at in (0.02, 0.98))
    assert low[2] > 200 > 110 > low[0] and high[0] > 200 > 60 > high[2]  # blue, orange
    labels = page.each("#difference-map .positions [role=img]", "ariaLabel")
    # ROSE of 2.5, less 3 in its third place, less DAISY of 5
    expected = ["−5", "0.5", "−2", "1.5", "2.5", "1"]
    assert [facts(label)[:3] for label in labels] == [["rose", "daisy", it] for it in expected]
    colours = page.colours("#difference-map .positions [role=img]")
    (red, _, blue), (red_5, _, blue_5) = colours[0], colours[4]
    assert blue > 200 and red < 110  # blue speaks for the other class
    assert 90 < red_5 < 140 and blue_5 < 40  # half of the scale, in orange


@pytest.mark.parametrize(
    ("asked", "predicted", "compared"),
    [
        ("photo=1", "rose", "daisy"),  # a mistake: the true class
        ("photo=2", "rose", "daisy"),  # which is its least probable one
        ("photo=3", "daisy", "rose"),
        ("photo=7", "daisy", "rose"),  # right: the class that is next
        ("photo=0&class=daisy", "rose", "daisy"),
    ],
)
def test_the_predicted_class_is_compared_with_the_true_one(visit, asked, predicted, compared):
    page = visit(asked)
    assert explained(page) == [[predicted], [compared], [predicted, compared]]
    assert page.eval("document.querySelector('#bars :checked').value") == compared


def test_a_position_tells_its_value_and_what_it_sees(visit):
    page = open_panels(visit, "photo=0")
    assert facts(page.text("#value")) == ["rose", "2.5", "2", "2", "coarse"]  # the highest one
    page.point("#compared-map .positions [role=img]:nth-child(6)")
    assert facts(page.text("#value")) == ["daisy", "1", "2", "3", "coarse"]
    place = shares_within(page.box("#photo .frame"), page.box("#photo .seen"))
    # Its middle lies at 0.8 of the height and 0.65 of the width; it sees 0.5 of the height (to the
    # edge of the photo) and 0.3 of the width.
    assert place == pytest.approx([0.5, 0.5, 0.3, 0.5], abs=0.01)
    page.point("h1")
    assert page.eval("document.querySelector('#photo .seen')") is None
    page.eval("document.querySelector('#compared-map .positions [role=img]').focus()")
    assert page.eval("document.querySelector('#photo .seen') !== null")
    page.eval("document.activeElement.blur()")
    assert page.eval("document.querySelector('#photo .seen')") is None


def test_a_heatmap_of_nothing_is_said_to_be_empty(visit):
    def empty(run):
        run["photos"][1]["heatmaps"][0] = run["photos"][1]["heatmaps"][1] | {"class": 1}

    words = visit("photo=1", empty).text("#value")
    assert facts(words) == ["rose"] and "othing" in words


def test_a_photo_with_a_single_heatmap_is_compared_with_none(visit):
    def single(run):
        del run["photos"][5]["heatmaps"][1]

    page = visit("photo=5", single)
    assert explained(page) == [["tulip"]]


def test_a_class_is_chosen_by_its_bar(visit):
    def three(run):
        for number, class_index in ((5, 1), (6, 0), (4, 0)):
            heatmaps = run["photos"][number]["heatmaps"]
            heatmaps.append(heatmaps[0] | {"class": class_index})

    page = visit("photo=5", three)
    assert explained(page)[1] == ["daisy"]
    page.click("#bars input[value=rose]")
    assert explained(page)[1] == ["rose"] and address(page)["class"] == "rose"
    page.press("ArrowUp")
    assert explained(page)[1] == ["daisy"] and address(page)["class"] == "daisy"
    page = visit("class=daisy", three)
    assert shown(page) == PHOTOS[4][0] and explained(page)[1] == ["daisy"]
    # Another photo is compared with a class of its own.
    page.click("#thumbnails [aria-label^='tulip/f.jpg']")
    assert explained(page)[1] == ["rose"] and address(page)["class"] == "rose"


def test_blocks_are_those_that_the_photo_has(visit):
    page = visit("photo=0")
    assert page.texts("#blocks .tab")[:2] == ["fine\n3 × 5", "coarse\n2 × 3"]
    page.click("#blocks .tab")
    assert address(page)["block"] == "fine" and "of fine" in page.text("#value")
    page.click("#thumbnails [aria-label^='tulip/e.jpg']")
    assert page.each("#blocks input", "disabled") == [True, False, True]  # the last: all blocks
    assert page.each("#blocks input", "checked") == [False, True, False]
    assert "of coarse" in page.text("#value")


# ---- Covered places ------------------------------------------------------------------------------


def bars(page):
    return page.each("#bars progress", "value"), page.texts("#bars .number")


def test_the_bars_move_while_a_place_is_covered(visit):
    page = visit("photo=1")
    before = bars(page)
    assert before[1] == ["80\xa0%", "15\xa0%", "5\xa0%"]
    frame = page.box("#photo .frame")
    for place, (row, column) in ((1, (0, 1)), (2, (1, 0))):
        page.point(f"#photo .positions span:nth-child({place + 1})")
        shares, numbers = bars(page)
        assert shares == pytest.approx([byte / 255 for byte in COVERED[place]])
        assert numbers == [f"{round(byte / 2.55)}\xa0%" for byte in COVERED[place]]
        frame = page.box("#photo .frame")
        covered = shares_within(frame, page.box("#photo .covered"))
        assert covered == pytest.approx([column / 2, row / 2, 0.5, 0.5], abs=0.01)
        assert f"row {row + 1}, column {column + 1}" in page.text("#value")
    page.point("h1")
    assert bars(page) == before and page.eval("document.querySelector('.covered')") is None
    page.eval("document.querySelector('#photo .positions span').focus()")
    page.press("ArrowRight")
    told = "row 1, column 2 of the photo: rose 80\xa0% → 20\xa0%; it says daisy, 70\xa0%"
    assert page.text("#value") == f"Without {told}" and bars(page)[1][0] == "20\xa0%"
    page.click("#thumbnails [aria-label^='daisy/c.jpg']")
    assert bars(page)[1] == ["60\xa0%", "30\xa0%", "10\xa0%"]
    assert "no places were blurred out" in page.text("#photo figcaption")


def test_a_covered_place_is_blurred(visit, tmp_path):
    page = visit("photo=1", lambda run: None)
    sheet = np.array(Image.open(tmp_path / "photos_1.png"))
    sheet[:40, 40:80] = 255  # the tile of the photo: white below black
    sheet[:10, 40:80] = 0
    Image.fromarray(sheet).save(tmp_path / "photos_1.png")
    page.open(tmp_path / "index.html", "photo=1")
    page.point("#photo .positions span")
    left, top, width, height = page.box("#photo .frame")
    picture = page.picture([left, top + page.eval("scrollY")], [width, height]).astype(int)
    # Near the edge of black: left in the place that is covered, right beside it.
    row, columns = int(0.22 * height), [int(width / 4), int(3 * width / 4)]
    blurred, sharp = picture[row, columns, 0]
    assert 60 < blurred < 200 and sharp < 30


# ---- Training photos -----------------------------------------------------------------------------


def test_the_training_photos_that_a_photo_is_most_like_are_shown_by_class(visit):
    page = visit("photo=1")
    assert page.texts("#like figcaption") == [
        "Of rose, the predicted class",
        "Of daisy, the true class",
    ]
    colours = page.colours("#like .tile")
    assert all(map(near, colours, [tile_colour(11, k) for k in (2, 0, 3)]))
    rest = page.text("#likeness")
    assert "12 training photos" in rest
    page.point("#like .tile")
    assert page.text("#likeness") == "rose/z.jpg: cosine 0.93"
    page.point("h1")
    assert page.text("#likeness") == rest
    page = visit("photo=1", lambda run: run.update(training=None))
    assert page.text("#likeness") == "" and page.texts("#like figcaption") == []


# ---- The tour ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("empty", "named"), [(0, "rose"), (1, "daisy")])
def test_the_tour_tells_that_nothing_speaks_for_a_class_rather_than_the_other(visit, empty, named):
    def take_away(run):
        entry = run["photos"][0]["heatmaps"][empty]
        entry |= {"peaks": (0, 0), "against_peaks": (0, 0)}
        run["photos"][0]["heatmaps"][1 - empty]["against_peaks"] = (0, 0)

    page = visit("photo=0&tour=3", take_away)
    page.click("#answer summary")
    found = [facts(sentence) for sentence in re.findall(r"[^.:]+[.:](?!\d)", page.text("#told"))]
    assert [named] in [it for it in found if len(it) == 1]
    assert sum("up to" in it or "down to" in it for it in page.text("#told").split(".")) == 1


def test_the_tour_asks_and_answers_from_the_worst_mistake(visit):
    page = visit("photo=5&true=tulip")
    page.click("#start")
    assert page.eval("document.title") == "What a network sees" and len(listed(page)) == 8
    assert address(page) == {"photo": "1", "class": "daisy", "tour": "1", "section": "photos"}
    guessed = "['verdict', 'bars', 'predicted-map'].map((id) => getComputedStyle($(id)).visibility)"
    assert page.eval(guessed) == ["hidden"] * 3
    assert page.eval("getComputedStyle($('photo')).visibility") == "visible"
    assert all(name in page.text("#question") for name in CLASSES)
    answers = []
    for step in range(1, 6):
        assert page.text("#question").startswith(f"{step} of 5") and not page.eval(
            "$('answer').open"
        )
        assert address(page)["tour"] == str(step)
        page.click("#answer summary")
        answers.append(page.text("#told"))
        if step == 1:
            assert page.eval(guessed) == ["visible"] * 3
            assert page.eval("document.title").startswith(PHOTOS[1][0])
        if step == 4:
            # Row 2, column 2 of coarse has its middle at 0.8 down and 0.45 across.
            assert bars(page)[1][0] == "40\xa0%"
            place = shares_within(page.box("#photo .frame"), page.box("#photo .covered"))
            assert place == pytest.approx([0, 0.5, 0.5, 0.5], abs=0.01)
        if step < 5:
            page.click("#step-on")
    assert answers[0].startswith("It says rose, 80\xa0%; it is daisy")
    assert answers[1] == (
        "It is highest for rose: 2.5 at row 2, column 2 of coarse. Better for rose by 0.78."
    )
    assert "rose: up to 2.5 at row 2, column 2" in answers[2]
    assert "daisy: down to −2 at row 1, column 3" in answers[2]
    assert "row 2, column 1 of the photo: rose 80\xa0% → 40\xa0%." in answers[3]
    assert answers[4].startswith("70\xa0% of what speaks for rose is concept 1")
    page.click("#told a")
    assert address(page)["concept"] == "1" and page.eval("$('concept').checkVisibility()")
    page.click("#thumbnails a:nth-child(3)")
    assert not page.eval("$('answer').open")  # that of another photo
    page.click(f"#thumbnails [aria-label^='{PHOTOS[1][0]}']")
    assert "rose/z.jpg: cosine 0.93" in answers[4] and "daisy/w.jpg: cosine 0.5" in answers[4]
    page.click("#tour [href='#tour=']")
    assert not page.eval("$('tour').checkVisibility()") and "tour" not in address(page)
    assert bars(page)[1][0] == "80\xa0%" and shown(page) == PHOTOS[1][0]


def test_without_mistakes_the_tour_takes_the_least_sure_photo_and_what_there_is(visit):
    def right(run):
        run["photos"] = run["photos"][:1] + run["photos"][4:6]
        for number, entry in enumerate(run["photos"]):
            entry["number"] = number
            del entry["heatmaps"][1:]
        run.update(filters=[], channels=[], training=None)
        run["concepts"]["found"] = []

    page = visit("", right)
    page.click("#start")
    for _ in range(4):
        page.click("#step-on")
        assert page.eval("document.title").startswith("tulip/e.jpg")
        page.click("#answer summary")
        assert len(page.text("#told")) > 20
        assert "undefined" not in page.text("#tour") and "NaN" not in page.text("#tour")


# ---- Filters -------------------------------------------------------------------------------------


MAP_ON_PHOTO = tile_colour(5, 1), photo_colour(0)


def shares_within(whole, part):
    """Left, top, width and height of a box in shares of another one."""
    left, top = (part[axis] - whole[axis] for axis in (0, 1))
    width, height = whole[2:]
    return [left / width, top / height, part[2] / width, part[3] / height]


def patch_place(row, column):
    """Where a photo is seen through a patch: left, top, width, height in shares of the photo."""
    height, width = FIELD["size"]
    middles = [
        first + k * step
        for first, step, k in zip(FIELD["start"], FIELD["step"], (row, column), strict=True)
    ]
    top = min(max(0, middles[0] - height / 2), 1 - height)
    left = min(max(0, middles[1] - width / 2), 1 - width)
    return left, top, width, height


def test_filters_stand_on_tabs_of_their_convolutions(visit):
    page = visit()
    assert [text.strip() for text in page.texts("#filter .tab")] == [
        "Convolution 5",
        "Convolution 7",
    ]
    visible = "$('filter').querySelectorAll('.tile')"
    seen = f"[...{visible}].filter((it) => it.checkVisibility())"
    page.eval("$('filter').scrollIntoView()")
    assert len(page.boxes(seen)) == 2
    page.click("document.querySelector('#filter .tab input')")
    colours = page.colours(seen)
    assert len(colours) == 4
    assert all(near(colour, tile_colour(4, k)) for k, colour in enumerate(colours) if k != 2)
    (silent,) = page.each("#filter .crossed", "ariaLabel")
    assert silent.startswith("filter 2 of convolution 5, silent")
    caption = page.text("#filter .caption")
    assert caption.splitlines() == ["What filters look for", "row by row"]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_filter_is_shown_beside_what_fires_it(visit, k):
    page = visit(f"photo=0&filter=5.{k}")
    assert page.eval("$('dialog').open")
    assert numbers_in_title(page) == sorted([5, k])
    assert page.eval("document.querySelector('#filter-5').checked")
    figures = page.texts("#parts figcaption")
    assert "conv_5" in figures[0]
    assert "rose/a.jpg" in figures[1] and f": {PEAKS[0][k]:g} " in figures[1]
    assert f"of up to {PATCHES[k][0][3]:g}." in figures[1]
    assert f" {PATCHES[k][0][3]:g}," in figures[2]
    # The whole tile, and nothing of what lies around it.
    for down, across in ((0.5, 0.5), (0.03, 0.03), (0.03, 0.97), (0.97, 0.03), (0.97, 0.97)):
        (colour,) = page.colours("#parts figure:nth-child(1) .tile", down, across)
        assert near(colour, tile_colour(4, k))
    # Its activation, added to the photo as light: where the field's positions look.
    left, top, width, height = page.box("#parts figure:nth-child(2) .frame")
    x, y, w, h = page.box("#parts figure:nth-child(2) .tile + .tile")
    assert width / height == pytest.approx(1.5, rel=0.01)
    for first, side, start, axis in ((x, w, left, 1), (y, h, top, 0)):
        whole = (height, width)[axis]
        begin = FIELD["start"][axis] - FIELD["step"][axis] / 2
        assert first == pytest.approx(start + begin * whole, abs=1)
        extent = FIELD["step"][axis] * FIELD["positions"][axis]
        assert side == pytest.approx(extent * whole, abs=1)


@pytest.mark.parametrize("number", [0, 1])
def test_the_activation_map_is_that_of_the_photo_and_filter(visit, number):
    page = visit(f"photo={number}&filter=5.1")
    page.eval("document.querySelector('#parts .activation').style.mixBlendMode = 'normal'")
    (colour,) = page.colours("#parts .activation")
    assert near(colour, tile_colour(5, 4 * number + 1))
    caption = page.texts("#parts figcaption")[1]
    assert PHOTOS[number][0] in caption and f": {PEAKS[number][1]:g} " in caption


def test_an_activation_map_lights_up_the_photo(visit):
    page = visit("photo=0&filter=5.1")
    (colour,) = page.colours("#parts .activation")
    # Light is added to light: what each of the two leaves dark stays dark.
    dark = [(255 - one) * (255 - two) / 255 for one, two in zip(*MAP_ON_PHOTO, strict=True)]
    assert near(colour, [255 - part for part in dark])


def test_a_photo_that_fires_a_filter_has_its_place_framed(visit):
    page = visit("photo=0&filter=5.0")
    assert "7.25" in facts(page.texts("#parts figcaption")[1])
    photo, seen = page.box("#parts figure:nth-child(2) .tile"), page.box("#parts .seen")
    assert shares_within(photo, seen) == pytest.approx(patch_place(2, 4), abs=0.01)
    page = visit("photo=1&filter=5.0")
    assert page.eval("document.querySelector('#parts .seen')") is None
    assert "fires it by" not in page.texts("#parts figcaption")[1]


def test_a_photo_without_activation_maps_is_shown_without(visit):
    page = visit("photo=3&filter=5.1")
    caption = page.texts("#parts figcaption")[1]
    assert "rose/d.jpg" in caption and "no activation map" in caption and "by 4." in caption
    assert page.eval("document.querySelector('#parts .activation')") is None
    (colour,) = page.colours("#parts figure:nth-child(2) .tile")
    assert near(colour, photo_colour(3))


@pytest.mark.parametrize("k", range(4))
def test_patches_show_what_the_position_sees_of_their_photo(visit, k):
    page = visit(f"filter=5.{k}")
    frames = page.boxes("#parts figure:nth-child(3) .frame")
    tiles = page.boxes("#parts figure:nth-child(3) .tile")
    colours = page.colours("#parts figure:nth-child(3) .frame")
    assert len(frames) == len(PATCHES[k])
    patches = zip(PATCHES[k], frames, tiles, colours, strict=True)
    for (number, row, column, _), frame, tile, colour in patches:
        assert near(colour, photo_colour(number))
        place = shares_within(tile, frame)
        assert place == pytest.approx(patch_place(row, column), abs=0.01)
        assert tile[2] / tile[3] == pytest.approx(PHOTOS[number][4], rel=0.02)


def test_a_patch_leads_to_its_photo(visit):
    page = visit("photo=0&filter=5.0")
    page.click("#parts figure:nth-child(3) a:nth-child(1)")
    assert address(page)["photo"] == "6" and shown(page) == PHOTOS[6][0]


def test_a_dialog_opens_steps_and_closes(visit):
    page = visit()
    page.click("document.querySelector('#filter .tab input')")
    page.click("document.querySelectorAll('#filter a')[3]")
    assert numbers_in_title(page) == [3, 5] and address(page)["filter"] == "5.3"
    page.click("#next")
    assert numbers_in_title(page) == [0, 5] and address(page)["filter"] == "5.0"
    page.click("#previous")
    assert numbers_in_title(page) == [3, 5]
    page.press("ArrowLeft")
    assert numbers_in_title(page) == [2, 5]
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert numbers_in_title(page) == [0, 5]
    page.press("Escape")
    assert not page.eval("$('dialog').open") and "filter" not in address(page)
    page.click("document.querySelectorAll('#filter a')[1]")
    assert numbers_in_title(page) == [1, 5]
    page.click("#close")
    assert not page.eval("$('dialog').open") and "filter" not in address(page)


def filters_in_order(page, number=5):
    """The numbers of the filters of a convolution as they stand."""
    labels = page.each(f"#filter-{number}-grid a > .tile", "ariaLabel")
    return [int(label.replace(",", " ").split()[1]) for label in labels]


def test_filters_stand_in_the_order_that_is_chosen(visit):
    page = visit("patterns=5&sort=class")
    # rose, 1 of 2; tulip, 2 of 2; tulip, 1 of 3; none
    assert filters_in_order(page) == [1, 3, 0, 2]
    orders = {
        0: [0, 3, 1, 2],  # 6.5 of 9.5, 1 of 2, 1.25 of 4, 0
        1: [1, 3, 0, 2],  # 3.5 of 4, 0.5 of 2, 2 of 9.5, 0
        2: [0, 1, 2, 3],  # none is known: the first photo without
        5: [0, 1, 2, 3],
    }
    page.choose("#sort", "photo")
    for number, expected in orders.items():
        page.click(f"#thumbnails [aria-label^='{PHOTOS[number][0]}']")
        assert filters_in_order(page) == expected
        assert ("no activations" in page.text("#sorted")) == (number >= 2)
    page.choose("#sort", "selectivity")
    assert filters_in_order(page) == [1, 3, 0, 2]
    page.choose("#sort", "")
    assert filters_in_order(page) == [0, 1, 2, 3] and page.text("#sorted") == ""
    assert address(page)["section"] == "filters"


def test_a_dialog_goes_on_in_the_order_of_the_filters(visit):
    page = visit("sort=class&filter=5.1")
    page.click("#next")
    assert numbers_in_title(page) == [3, 5]
    page.click("#previous")
    page.click("#previous")
    assert numbers_in_title(page) == [2, 5]


def test_a_filter_can_be_shown_by_what_fires_it_most(visit):
    page = visit("patterns=5")
    page.click("#strongest")
    assert address(page)["strongest"] == "yes" and address(page)["section"] == "filters"
    tiles = "[...$('filter').querySelectorAll('a > :is(.tile, .frame)')]"
    seen = f"{tiles}.filter((it) => it.checkVisibility())"
    colours = page.colours(seen)
    for k, strongest in ((0, 6), (1, 3), (3, 5)):
        assert near(colours[k], photo_colour(strongest))
    assert len(colours) == 4 and page.eval(f"{seen}[2].matches('.crossed')")
    (_, _, width, height), *_ = page.boxes(seen)
    # Of a square photo, 0.2 of the width and 0.4 of the height.
    assert width / height == pytest.approx(0.5, rel=0.05)


def test_the_classes_of_what_fires_a_filter_are_counted(visit):
    def second_rose(run):  # which was taken for a daisy
        run["filters"][0]["patches"][0].append([3, 0, 0, 2.0])

    page = visit("filter=5.0", second_rose)
    assert page.texts("#parts figcaption")[2].endswith(": 2 rose, 1 tulip, 1 daisy")
    assert page.each("#filter-5-grid .tile", "ariaLabel")[0].endswith("2 rose, 1 tulip, 1 daisy")
    strip = page.boxes("#filter-5-grid a:first-child .mix span")
    assert [box[2] / strip[1][2] for box in strip] == pytest.approx([2, 1, 1], abs=0.1)
    colour = "computedStyleMap().get('background-color').toString()"
    edge = "computedStyleMap().get('border-left-color').toString()"
    legend = dict(zip(page.texts("#legend span"), page.each("#legend span", edge), strict=True))
    colours = page.each("#filter-5-grid a:first-child .mix span", colour)
    assert colours == [legend[name] for name in ("rose", "tulip", "daisy")]
    assert len(set(legend.values())) == 3


# ---- Layers --------------------------------------------------------------------------------------


def test_what_has_the_focus_has_a_frame(visit):
    page = visit("photo=0")
    page.press("Tab")  # a frame is for those who use the keyboard
    # A block's button lies unseen in its box.
    for focused, framed in (
        ("#blocks input", "#blocks .tab"),
        ("#thumbnails a", "#thumbnails a"),
        ("#bars input:enabled", "#bars input:enabled"),
    ):
        page.eval(f"document.querySelector('{focused}').focus()")
        frame = f"getComputedStyle(document.querySelector('{framed}')).outlineStyle"
        assert page.eval(frame) != "none", focused


def test_a_click_on_a_message_closes_it(visit):
    page = visit("photo=100")
    assert page.eval("$('word').matches(':popover-open')")
    page.click("#word")
    assert not page.eval("$('word').matches(':popover-open')")


def test_without_scripts_each_picture_of_a_default_run_is_shown_once_in_order():
    page = PAGE.read_text("utf-8")
    _, pictures = re.findall("<noscript>(.*?)</noscript>", page, re.DOTALL)
    shown = re.findall('src="(.*?)"', pictures)
    assert shown == [
        *("CAM_1.jpeg", "CAM_2.jpeg", "CAM_3.jpeg", "CAM_layers.jpg", "CAM_mistakes.jpg"),
        *("conv2d_3_filters.jpg", "conv2d_8_filters.jpg", "conv2d_8_examples.jpg"),
        *("conv2d_40_filters.jpg", "conv2d_40_examples.jpg", "OriginalImage.jpeg", "ReLU.png"),
        *(f"{kind}_{k}_grid.jpg" for k in (1, 4, 9) for kind in ("conv2d", "activation")),
        *("confusion_matrix.png", "training_curves.png"),
    ]


def test_channels_are_shown_before_and_after_the_activation(visit):
    page = visit()
    seen = "[...$('channel').querySelectorAll('.tile')].filter((it) => it.checkVisibility())"
    for sheet, file in ((7, "conv_1"), (8, "activation_1")):
        page.eval("$('channel').scrollIntoView()")
        colours = page.colours(seen)
        assert len(colours) == 5
        assert all(near(it, tile_colour(sheet, k)) for k, it in enumerate(colours) if k != 3)
        assert file in page.text("#channel")
        page.click("#after")
    silent = "channel 3 of convolution 1, activation_1, silent"
    assert page.each("#channel .crossed", "ariaLabel") == [silent]


def test_layers_stand_on_tabs_of_their_convolutions(visit):
    seen = "[...$('channel').querySelectorAll('.tile')].filter((it) => it.checkVisibility())"
    page = visit("layers=4")
    assert len(page.boxes(seen)) == 3
    page.click("#channel .tab")
    assert len(page.boxes(seen)) == 5 and address(page)["layers"] == "1"
    page = visit("channel=4.2&after=yes")
    assert numbers_in_title(page) == [2, 4] and len(page.boxes(seen)) == 3
    (colour,) = page.colours("#parts .tile")
    assert near(colour, tile_colour(10, 2))


def test_a_channel_is_shown_large_before_and_after(visit):
    page = visit()
    page.click("document.querySelectorAll('#channel a')[4]")
    assert numbers_in_title(page) == [1, 4] and address(page)["channel"] == "1.4"
    assert [text.split()[-1] for text in page.texts("#parts figcaption")] == [
        "conv_1",
        "activation_1",
    ]
    assert all(map(near, page.colours("#parts .tile"), [tile_colour(7, 4), tile_colour(8, 4)]))
    page.click("#next")
    assert numbers_in_title(page) == [0, 1]


# ---- The address, the keyboard -------------------------------------------------------------------


def test_an_address_opens_what_it_names_and_says_so_again(visit):
    chosen = {
        "photo": "0",
        "class": "daisy",
        "block": "fine",
        "order": "confidence",
        "true": "rose",
        "result": "right",
        "patterns": "5",
        "after": "yes",
    }
    page = visit("&".join(f"{name}={it}" for name, it in chosen.items()))
    assert shown(page) == PHOTOS[0][0] and listed(page) == names([0])
    values = "['order', 'true', 'predicted', 'result'].map((id) => $(id).value)"
    assert page.eval(values) == ["confidence", "rose", "", "right"]
    assert page.eval("$('filter-5').checked && $('after').checked")
    assert "of fine" in page.text("#value")
    assert page.eval("document.querySelector('#blocks :checked').value") == "fine"
    assert address(page) == chosen and page.text("#word") == ""
    page.choose("#order", "")
    del chosen["order"]
    assert address(page) == chosen | {"section": "photos"}


UNKNOWN = [
    "photo=99 class=lily block=mixed9 order=name true=0 result=perhaps filter=5.9 x=1",
    "photo=x filter=8.0 channel=x section=x layers=5 after=no concept=2",
]


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_unknown_values_of_an_address_fall_back_with_a_word(visit, unknown):
    asked = "&".join([*unknown.split(), "predicted=rose"])
    page = visit(asked)
    assert all(one in page.text("#word") for one in unknown.split())
    assert "rose" not in page.text("#word")
    assert listed(page) == names([1, 2, 0]) and shown(page) == PHOTOS[1][0]
    assert page.eval("location.hash") == f"#{asked}"
    assert not page.eval("$('dialog').open")


def test_a_class_without_a_heatmap_falls_back_with_a_word(visit):
    page = visit("photo=0&class=tulip")
    word = page.text("#word")
    assert facts(word) == ["tulip", "daisy"] and "no heatmap" in word
    assert explained(page)[1] == ["daisy"]
    assert facts(page.text("#without")) == ["tulip"]


def test_arrow_keys_go_through_a_group_and_tab_leaves_it(visit):
    page = visit()
    page.eval("document.querySelector('#thumbnails a').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert shown(page) == PHOTOS[3][0]
    page.press("ArrowLeft")
    assert shown(page) == PHOTOS[1][0]
    inside = "document.activeElement.closest('#thumbnails') !== null"
    assert page.eval(inside)
    page.press("Tab")
    assert not page.eval(inside)
    page.eval("document.querySelector('#confusion a[tabindex=\"0\"]').focus()")
    page.press("ArrowDown")
    page.press("ArrowRight")
    assert page.eval("document.activeElement.ariaLabel") == "rose predicted as rose: 1 photos"
    page.eval("document.querySelector('.positions [tabindex=\"0\"]').focus()")
    page.press("ArrowRight")
    assert page.eval("document.activeElement.ariaLabel") in page.text("#value")


# ---- The run, and what it lacks ------------------------------------------------------------------


def test_the_run_tells_its_settings_and_pictures(visit):
    page = visit()
    assert page.text("#lead").splitlines() == ["It learnt 3 classes.", "It names 5 of 8 right."]
    assert page.text("#warnings") == "⚠ Only 2 photos of a class."
    assert page.text("#judged") == "71\xa0% of the heatmaps are better."
    assert page.text("#command").startswith("python model_training")
    assert page.text("#settings").splitlines() == ["epochs: 2", "weights: none"]
    assert page.each("#pictures figcaption", "textContent") == ["The first picture"]
    assert page.texts("#curves figcaption") == ["Loss of 2 epochs"]
    file = "href.split('/').at(-1)"
    assert page.each("#pictures a", file) == ["first.png"]
    assert page.each("#curves a", file) == ["training_curves.png"]


def test_sections_without_data_are_hidden(visit):
    def without(run):
        run.update(filters=[], channels=[], test=None)

    page = visit(change=without)
    for name, hidden in (("photos", False), ("filters", True), ("channels", True)):
        assert page.eval(f"!$('{name}').checkVisibility()") == hidden
        assert (
            page.eval(f"!document.querySelector('nav [href*={name}]').checkVisibility()") == hidden
        )
    assert not page.eval("$('evaluation').checkVisibility()")


def test_a_page_without_its_run_says_what_is_missing(browser, tmp_path):
    shutil.copy(PAGE, tmp_path)
    browser.open(tmp_path / "index.html")
    assert "run.js is missing" in browser.text("#lead")


def test_a_run_of_another_format_is_said_to_be_so(browser, site, tmp_path):
    shutil.copy(PAGE, tmp_path)
    write_script(tmp_path, site[1] | {"format": 3})
    browser.open(tmp_path / "index.html")
    assert "format 3" in browser.text("#lead") and "--skip-training" in browser.text("#lead")
    assert not browser.eval("document.querySelector('#thumbnails').checkVisibility()")


def test_how_sure_it_is_stands_beside_how_often_it_is_right(visit):
    page = visit()
    rows = [row.split() for row in page.texts("#bins tr")][1:]
    assert rows == [
        ["50–67", "%", "1", "of", "1,", "100", "%", "40", "%"],
        ["67–83", "%", "1", "of", "3,", "33", "%", "60", "%"],
        ["83–100", "%", "4", "of", "4,", "100", "%", "93", "%"],
    ]
    boxes = page.boxes("#bins .count")
    assert [box[2] / boxes[2][2] for box in boxes] == pytest.approx([0.25, 0.75, 1], abs=0.01)
    assert "0.123" in page.text("#calibration") and "6 bins" in page.text("#calibration")
    let_pictures_load(page)
    page.eval("$('reliability').scrollIntoView()")
    _, full, _ = page.colours("#bins .count", 0.5, 0.2)
    all_right, empty, _ = page.colours("#bins .count", 0.5, 0.6)
    assert (
        near(all_right, (154, 52, 18))
        and near(full, (154, 52, 18))
        and near(empty, (250, 248, 244))
    )
    assert page.eval("$('table').href.split('/').at(-1)") == "predictions.csv"
    page = visit(change=lambda run: run.update(reliability=None))
    assert not page.eval("$('reliability').checkVisibility()")
    assert page.eval("$('table').checkVisibility()")


HOSTILE = ['"ro\'se"', "</script><b>x", "$x$ & `y`\n\u2028z"]


def test_names_are_shown_as_they_are(visit):
    def rename(run):
        run["classes"] = HOSTILE
        run["lead"] = HOSTILE
        for photo, name in zip(run["photos"], HOSTILE, strict=False):
            photo["name"] = name
        run["test"][0][1:4] = HOSTILE
        run["pictures"][0]["caption"] = HOSTILE[1]

    page = visit("photo=1", rename)
    assert page.eval("document.querySelectorAll('b:not(p > b)').length") == 0
    assert HOSTILE[1] in page.text("#verdict") and HOSTILE[1] in page.text("#lead")
    assert page.each("#true option", "text")[1:3] == HOSTILE[:2]
    assert page.eval("[...$('bars').querySelectorAll('input')].map((it) => it.value)") == [
        HOSTILE[k] for k, _ in PHOTOS[1][2]
    ]
    page.choose("#order", "confidence")
    assert address(page)["class"] == HOSTILE[0]
    assert page.each("#pictures figcaption", "textContent") == [HOSTILE[1]]


# ---- History -------------------------------------------------------------------------------------


def go(page, steps):
    """Go back or forward in the history, and wait until the page knows of it."""
    page.eval(
        "new Promise((done) => { addEventListener('popstate', () => setTimeout(done),"
        f"{{ once: true }}); history.go({steps}); }})"
    )


def test_back_steps_between_sections_and_not_through_each_arrow_key(visit):
    page = visit("photo=5")
    start = page.eval("history.length")
    page.click("#thumbnails [aria-label^='daisy/b.jpg']")
    for _ in range(3):
        page.press("ArrowRight")
    assert shown(page) == PHOTOS[7][0] and page.eval("history.length") == start
    page.click("#confusion tr:nth-child(3) td:nth-child(2) a")
    assert shown(page) == PHOTOS[3][0] and listed(page) == names([3])
    assert page.eval("history.length") == start + 1
    page.click("nav [href='#evaluation']")
    page.click("#confusion tr:nth-child(2) td:nth-child(3) a")
    assert page.eval("history.length") == start + 3 and listed(page) == names([1, 2])
    assert page.eval("document.activeElement.closest('#thumbnails') !== null")
    go(page, -1)
    assert listed(page) == names([3]) and address(page)["section"] == "evaluation"
    assert page.eval("document.activeElement.ariaLabel") == "daisy predicted as rose: 2 photos"
    go(page, -1)
    assert address(page)["section"] == "photos" and shown(page) == PHOTOS[3][0]
    go(page, -1)
    assert shown(page) == PHOTOS[7][0] and len(listed(page)) == 8
    assert page.eval("document.activeElement.ariaLabel") == "rose predicted as daisy: 1 photos"
    go(page, 3)
    assert listed(page) == names([1, 2])


def test_while_a_key_is_held_the_address_waits(visit):
    page = visit("photo=4")
    page.eval("document.querySelector('#thumbnails a').focus()")
    page.hold("ArrowRight")
    assert address(page)["photo"] == "1"
    for _ in range(3):
        page.hold("ArrowRight", repeats=True)
    assert shown(page) == PHOTOS[7][0] and address(page)["photo"] == "1"
    page.release("ArrowRight")
    assert address(page)["photo"] == "7"


@pytest.mark.parametrize("close", ["Escape", "#close"])
def test_back_does_not_reopen_a_closed_dialog(visit, close):
    page = visit("photo=5&section=photos")
    start = page.eval("history.length")
    page.click("document.querySelectorAll('#filter a')[5]")
    assert page.eval("$('dialog').open") and page.eval("history.length") == start + 1
    page.click("#previous")
    page.click("#next")
    page.press(close) if close == "Escape" else page.click(close)
    page.wait("!$('dialog').open && !location.hash.includes('filter=')")
    assert address(page) == {"photo": "5", "section": "photos"}
    assert page.eval("document.activeElement === document.querySelectorAll('#filter a')[5]")
    go(page, 1)
    assert page.eval("$('dialog').open")
    go(page, -1)
    assert not page.eval("$('dialog').open") and shown(page) == PHOTOS[5][0]


def test_a_dialog_that_a_link_opened_closes_in_place(visit):
    page = visit("photo=5&filter=5.1")
    start = page.eval("history.length")
    page.press("Escape")
    page.wait("!location.hash.includes('filter=')")  # the event of its closing comes later
    assert page.eval("history.length") == start
    assert not page.eval("$('dialog').open")
    assert address(page)["photo"] == "5"


def test_back_closes_a_dialog_that_was_opened_from_its_own_section(visit):
    page = visit("photo=5&sort=class&section=filters")
    start = page.eval("history.length")
    page.click("document.querySelectorAll('#filter a')[5]")
    assert page.eval("$('dialog').open") and page.eval("history.length") == start + 1
    go(page, -1)
    assert not page.eval("$('dialog').open") and address(page)["sort"] == "class"


def test_going_from_a_dialog_to_its_photo_takes_no_step_more(visit):
    page = visit("photo=5")
    start = page.eval("history.length")
    page.click("document.querySelectorAll('#filter a')[5]")
    page.click("document.querySelector('#parts a[href*=\"section=photos\"]')")
    assert not page.eval("$('dialog').open") and address(page)["section"] == "photos"
    assert page.eval("history.length") == start + 1


def test_sections_are_gone_to_with_all_that_is_chosen(visit):
    page = visit("photo=5&true=tulip&after=yes")
    for name in ("filters", "channels", "evaluation", "the-run", "photos"):
        page.click(f"nav [href='#{name}']")
        chosen = address(page)
        assert chosen["section"] == name and chosen["after"] == "yes"
        assert shown(page) == PHOTOS[5][0] and listed(page) == names([5, 6])
    page.eval("document.querySelector('nav [href=\"#channels\"]').focus()")
    page.press("Enter")
    page.press("Tab")
    assert page.eval("document.activeElement.id") == "after"
    assert shown(visit("channels")) == PHOTOS[4][0]


def many(run):
    """A run of 120 photos, so that the list is scrolled."""
    whole = run["photos"][5]
    run["photos"] += [whole | {"number": number, "doubt": 1.0} for number in range(9, 120)]


def test_a_link_opens_at_its_subject_with_its_thumbnail_in_sight(visit, browser):
    browser.resize(390, 700)
    try:
        page = visit("photo=100", many)
        _, list_top, _, list_height = page.box("#thumbnails")
        _, top, _, height = page.box("#thumbnails [aria-current=true]")
        assert 0 <= list_top <= top and top + height <= list_top + list_height + 1 <= 700
        page = visit("section=filters&photo=100", many)
        assert -1 < page.box("#filters")[1] < 50
        page = visit("channels", many)
        assert -1 < page.box("#channels")[1] < 700
    finally:
        browser.resize(*WINDOW)


def test_titles_name_what_is_shown(visit):
    page = visit("photo=3")
    assert page.eval("document.title").startswith("rose/d.jpg")
    page.click("#thumbnails [aria-label^='daisy/b.jpg']")
    assert page.eval("document.title").startswith("daisy/b.jpg")
    page.click("document.querySelectorAll('#filter a')[4]")
    title = page.eval("document.title")
    assert facts(title) == ["7", "0", "daisy/b.jpg"]


# ---- The list ------------------------------------------------------------------------------------


def test_the_photo_shown_is_one_of_the_list_with_its_own_class(visit):
    page = visit("photo=0&class=daisy")
    page.choose("#true", "daisy")
    assert shown(page) == PHOTOS[1][0] and address(page)["class"] == "daisy"
    assert explained(page)[:2] == [["rose"], ["daisy"]]
    page.choose("#predicted", "daisy")
    assert shown(page) == PHOTOS[7][0] and address(page)["class"] == "rose"
    page.choose("#predicted", "tulip")
    assert listed(page) == [] and not page.eval("$('viewer').checkVisibility()")
    page.choose("#true", "")
    assert shown(page) == PHOTOS[4][0] and page.eval("$('viewer').checkVisibility()")


def test_the_class_of_an_earlier_photo_is_not_kept(visit):
    def add_tulip(run):
        heatmaps = run["photos"][7]["heatmaps"]
        heatmaps.append(heatmaps[0] | {"class": 2})

    page = visit("photo=7&class=tulip&order=confidence", add_tulip)
    assert explained(page)[1] == ["tulip"]
    page.choose("#predicted", "rose")
    assert shown(page) == PHOTOS[2][0]  # which has a heatmap for tulip, too
    assert explained(page)[1] == ["daisy"]


def test_a_photo_that_is_asked_for_is_in_the_list(visit):
    page = visit("photo=6&true=daisy")
    assert shown(page) == PHOTOS[6][0] and len(listed(page)) == 8
    assert PHOTOS[6][0] in page.text("#word") and page.eval("$('true').value") == ""
    page = visit("photo=6&result=wrong")  # which is right
    assert shown(page) == PHOTOS[6][0] and len(listed(page)) == 8
    page = visit("photo=8")
    assert shown(page) == PHOTOS[8][0]
    page.choose("#bars input:nth-child(1)", "daisy")
    assert shown(page) == PHOTOS[8][0]


def test_of_a_larger_test_the_number_of_all_photos_is_told(visit):
    page = visit("photos", lambda run: run.update(photo_count=4321))
    assert facts(page.text("#count")) == ["8", "4321"]


@pytest.mark.parametrize(("result", "expected"), [("right", [7, 5, 0, 6]), ("wrong", [1, 3, 2])])
def test_right_and_wrong_predictions_are_told_apart(visit, result, expected):
    page = visit()
    page.choose("#result", result)
    assert listed(page) == names(expected) and address(page)["result"] == result


def test_a_filtered_list_says_so_and_can_be_widened(visit):
    page = visit()
    assert page.text("#count") == "8 of 9 photos"
    assert not page.eval("$('show-all').checkVisibility()")
    page.choose("#true", "daisy")
    page.choose("#predicted", "rose")
    page.choose("#result", "wrong")
    words = page.text("#count")
    assert facts(words) == ["2", "9", "daisy", "rose"] and "wrong" in words
    page.choose("#order", "confidence")
    page.click("#show-all")
    assert page.text("#count") == "8 of 9 photos"
    assert page.eval("$('order').value") == "confidence" and shown(page) == PHOTOS[1][0]


def test_zeros_of_the_confusion_matrix_lead_nowhere(visit):
    page = visit()
    counts = sorted(count for row in COUNTS for count in row if count)
    assert sorted(map(int, page.texts("#confusion a"))) == counts
    page.eval("document.querySelector('#confusion tr:nth-child(4) a').focus()")
    page.press("ArrowUp")
    assert page.eval("document.activeElement.ariaLabel") == "rose predicted as rose: 1 photos"
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.eval("document.activeElement.ariaLabel") == "daisy predicted as rose: 2 photos"


def test_the_names_of_the_list_are_copied(visit):
    page = visit("predicted=rose")
    page.command("Browser.setPermission", permission={"name": "clipboard-write"}, setting="granted")
    page.command("Browser.setPermission", permission={"name": "clipboard-read"}, setting="granted")
    page.click("#copy")
    page.wait("$('word').textContent !== ''")
    assert page.eval("navigator.clipboard.readText()") == "\n".join(names([1, 2, 0]))
    assert "3 file names" in page.text("#word")


def test_names_that_cannot_be_copied_are_marked(visit):
    page = visit("predicted=rose")
    page.command("Browser.setPermission", permission={"name": "clipboard-write"}, setting="denied")
    page.click("#copy")
    page.wait("$('word').textContent !== ''")
    assert page.eval("getSelection().toString()") == "\n".join(names([1, 2, 0]))


# ---- What is pointed at --------------------------------------------------------------------------


TOLD = [
    ("#predicted-map .positions span:nth-child(6)", "#value", ["rose", "2", "2", "3", "coarse"]),
    ("#thumbnails a:nth-child(2) .tile", "#thumbnail", ["daisy/b.jpg", "rose", "80"]),
    ("#filter .panel .tile", "#filter-5-told", ["0", "5", "9.5", "tulip/f.jpg"]),
    ("#channel .panel .tile", "#channel-1-told", ["0", "1", "conv_1"]),
    ("#confusion tr:nth-child(4) td:nth-child(2) span", "#cell", ["tulip", "daisy", "0"]),
]


def test_a_value_is_told_while_it_is_pointed_at_and_no_longer(visit):
    page = visit("photo=0&patterns=5")
    for part, output, told in TOLD:
        before = page.text(output)
        assert facts(before)[: len(told)] != told
        page.point(part)
        assert facts(page.text(output))[: len(told)] == told
        page.point("h1")
        assert page.text(output) == before
        if "td" not in part:
            page.eval(f"document.querySelector({part!r}).closest('[tabindex]').focus()")
            assert facts(page.text(output))[: len(told)] == told
            page.eval("document.activeElement.blur()")
            assert page.text(output) == before


def test_patches_tell_their_place_counted_from_one(visit):
    page = visit("filter=5.0")
    for k, (number, row, column, activation) in enumerate(PATCHES[0], start=1):
        page.point(f"#parts .sheet a:nth-child({k})")
        place = [str(row + 1), str(column + 1), "activation_5"]
        assert facts(page.text("#part")) == [PHOTOS[number][0], f"{activation:g}", *place]
    page.point("#title")
    assert page.text("#part").strip() == ""


def test_a_patch_shows_its_photo_beside_the_filter(visit):
    page = visit("photo=3&filter=5.0")
    page.click("#parts .sheet a:nth-child(1)")
    assert page.eval("$('dialog').open") and address(page)["photo"] == "6"
    assert "tulip/f.jpg" in page.texts("#parts figcaption")[1]
    place = shares_within(page.box("#parts figure:nth-child(2) .tile"), page.box("#parts .seen"))
    assert place == pytest.approx(patch_place(1, 3), abs=0.01)
    page.click("#parts [href*='section=photos']")
    assert not page.eval("$('dialog').open") and shown(page) == PHOTOS[6][0]
    assert address(page)["section"] == "photos" and -1 < page.box("#photos")[1] < 50


# ---- Layout --------------------------------------------------------------------------------------


def flowers(run):
    """A test of hundreds of photos of five classes."""
    names = ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    counts = [[name, *[120] * 5, "0.20"] for name in names]
    run["classes"] = names
    run["test"] = [
        ["true \\ predicted", *names, "recall"],
        *counts,
        ["precision", *["0.20"] * 5, ""],
    ]
    run["reliability"]["bins"] = [[216, 0.99, 211]] * 10


def test_numbers_stand_in_one_line_and_pictures_keep_their_place(visit, browser):
    browser.resize(390, 800)
    try:
        page = visit("evaluation", flowers)
        for table in ("confusion", "bins"):
            assert page.eval(f"$('{table}').getBoundingClientRect().right") <= 390
            assert page.eval(f"$('{table}').scrollWidth <= $('{table}').clientWidth"), table
        page = visit("photo=8")
        assert {box[3] for box in page.boxes("#bars .number")} == {page.box("#bars .number")[3]}
        assert len({round(box[3]) for box in page.boxes("#confusion td *")}) == 1
        assert page.eval("document.documentElement.scrollWidth") == 390
    finally:
        browser.resize(*WINDOW)
    page = visit()
    _, _, width, height = page.box("#strip")  # its file is a square
    assert width / height == pytest.approx(1611 / 433, rel=0.01)
    sizes = page.eval(
        "[...document.querySelectorAll('#curves img, #pictures img')].map((it) =>"
        "[it.getAttribute('width'), it.getAttribute('height')])"
    )
    assert sorted(sizes) == [["300", "100"], ["40", "40"]]


def test_the_gallery_is_a_list_that_opens(visit):
    page = visit()
    visible = "document.querySelector('#pictures img').checkVisibility()"
    assert not page.eval(visible)
    let_pictures_load(page)
    page.click("#gallery > summary")
    assert page.text("#pictures li") == "The first picture" and not page.eval(visible)
    page.click("#pictures summary")
    assert page.eval(visible)


@pytest.mark.parametrize("dark", [False, True])
def test_photo_heatmaps_and_classes_are_in_one_view(visit, browser, dark):
    browser.resize(1280, 680, dark)
    try:
        page = visit("photo=1")
        parts = ["#thumbnails", "#verdict", "#photo", "#predicted-map", "#compared-map"]
        for part in [*parts, "#difference-map", "#bars", "#blocks", "#worth"]:
            left, top, width, height = page.box(part)
            assert left >= 0 and left + width <= 1280, part
            assert top >= 0 and top + height <= 680, part
        left, _, width, height = page.box("#thumbnails")
        assert left + width <= page.box("#photo")[0] and height > 400
        tops = [page.box(part)[1] for part in parts[2:]]
        assert tops == [tops[0]] * 3
    finally:
        browser.resize(*WINDOW)


def test_on_a_phone_bars_come_first_and_panels_are_swiped(visit, browser):
    browser.resize(390, 844)
    try:
        page = visit("photo=1")
        assert page.eval("document.documentElement.scrollWidth") == 390
        assert page.box("#bars")[1] < page.box("#panels")[1]
        swiped = "$('panels').scrollWidth / $('panels').clientWidth"
        assert page.eval(swiped) > 3
        _, _, width, _ = page.box("#photo")
        assert width > 250
    finally:
        browser.resize(*WINDOW)


# ---- All of it -----------------------------------------------------------------------------------


ADDRESSES = [
    "",
    *(f"photo={number}" for number in range(8)),
    "photo=0&class=daisy&block=fine",
    "photo=0&block=all",
    "photo=2&class=tulip",
    "photo=3&concept=0",
    "photo=0&concept=1&order=confidence",
    "true=daisy&predicted=rose&order=true",
    "result=wrong",
    "photo=0&filter=5.0&sort=class",
    "photo=1&filter=5.1&sort=selectivity",
    "photo=5&filter=5.3&patterns=5&strongest=yes",
    "filter=7.1&patterns=7",
    "channel=1.4&photo=3",
    "channel=1.3&after=yes&photo=1",
    "channel=4.2&layers=4",
    "patterns=5&strongest=yes&layers=1&after=yes",
    *(f"photo=1&tour={step}" for step in range(1, 6)),
]


@pytest.mark.parametrize("width", [WINDOW[0], 390])
def test_all_that_a_visitor_meets_is_as_it_was_when_it_was_looked_at(visit, request, width):
    page, found = visit(), {}
    page.resize(width, 844)
    for asked in ADDRESSES:
        page = visit(asked)
        found[asked] = [" ".join(it) for it in record.facts_of_page(page, CLASSES)]
        page.eval("document.querySelectorAll('details').forEach((it) => { it.open = true; })")
        page.settle()
        opened = [" ".join(it) for it in record.facts_of_page(page, CLASSES)]
        found[f"{asked}, opened"] = [it for it in opened if it not in found[asked]]
    page.resize(*WINDOW)
    record.check(f"page_{width}", found, request.config.option.record)

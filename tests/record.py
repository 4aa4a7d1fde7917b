"""All that is shown, on record as it was when somebody last looked at it.

Other tests work values out a second time; this record tells of every change in what they leave out.
It holds facts: numbers, names, colours, and which stands before which, but no wording and no place
in pixels. After a change that is meant, `pytest --record` writes it anew, and the difference is
read before it is committed.
"""

import base64
import difflib
import json
import re
from pathlib import Path

import numpy as np
from matplotlib import colors
from PIL import Image

FOLDER = Path(__file__).parent / "record"
# What is not a name, but turns the sense of a sentence.
CLAIMS = r"No better|Better|[Tt]he same|right|mistakes?|empty|never|silent|rather than|outweighed"
NAMES = r"[\w-]+/[\w-]+\.\w+|[A-Za-z]\w*[_.]\w+"  # of photos, layers and files
NUMBERS = r"[−-]?\d+(?:[.,]\d+)*"
MAPS = ("map", "maps", "against", "covered")  # keys under which a text is bytes in base64


def facts_of(text, classes):
    """The classes, names, numbers and claims of a text, in its order."""
    named = [rf"\b{re.escape(name)}\b" for name in classes]
    return re.findall("|".join([NAMES, *named, NUMBERS, CLAIMS]), text)


def squares(picture):
    """The mean colours of squares of a picture, 8 a side or 24 of one with many parts."""
    count = 24 if max(picture.shape) > 400 else 8
    small = Image.fromarray(picture.astype("uint8")).convert("RGB")
    small = small.resize((count, count), Image.Resampling.BOX)
    return {"bytes": base64.b64encode(small.tobytes()).decode()}


def facts_of_run(data, classes, key=None):
    """What run.js holds, its texts in facts."""
    if isinstance(data, dict):
        # Versions are those of the machine, and the faintest maps of concepts are its rounding.
        left_out = ("settings", "maps" if key == "concepts" else "")
        return {it: facts_of_run(data[it], classes, it) for it in data if it not in left_out}
    if isinstance(data, list):
        return [facts_of_run(it, classes, key) for it in data]
    if isinstance(data, str):
        return {"bytes": data} if key in MAPS else facts_of(data, classes)
    return data


def facts_of_figure(figure, classes):
    """What each part of a matplotlib figure shows."""
    return [facts_of_axes(axes, classes) for axes in figure.axes] + [
        facts_of(text.get_text(), classes) for text in figure.texts
    ]


def facts_of_axes(axes, classes):
    titles = [axes.get_title(loc=place) for place in ("left", "center", "right")]
    ticks = [it.get_text() for it in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    written = sorted(axes.texts, key=lambda it: it.get_position()[::-1])
    return {
        "titles": [facts_of(text, classes) for text in titles],
        "labels": [facts_of(text, classes) for text in (axes.get_xlabel(), axes.get_ylabel())],
        "ticks": [facts_of(text, classes) for text in ticks if axes.axison],
        "written": [facts_of(text.get_text(), classes) for text in written],
        "limits": [*axes.get_xlim(), *axes.get_ylim()],
        "images": [facts_of_image(image) for image in axes.images],
        "lines": [facts_of_line(line, classes) for line in axes.lines],
    }


def facts_of_image(image):
    colours = image.to_rgba(image.get_array(), bytes=True)[..., :3]
    return {"colours": squares(colours), "extent": [*map(float, image.get_extent())]}


def facts_of_line(line, classes):
    points = line.get_xydata()
    return {
        "label": facts_of(line.get_label(), classes),
        "points": points[:: max(1, len(points) // 20)].tolist(),
        "look": [line.get_linestyle(), line.get_marker(), colors.to_hex(line.get_color())],
    }


# What a visitor meets on a page from top to bottom: texts, what screen readers are told, where a
# link leads, what is chosen, and places and colours that were set from the run's values.
SEEN_ON_A_PAGE = """
(() => {
  const found = [];
  function read(node) {
    if (node.nodeType === Node.TEXT_NODE) found.push(node.data);
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    if (!node.checkVisibility({ visibilityProperty: true })) return;
    found.push(node.ariaLabel, node.title, node.hash, node.getAttribute("style"));
    found.push(node.ariaCurrent === "true" ? "right" : "");
    if (["PROGRESS", "SELECT", "INPUT"].includes(node.tagName)) {
      found.push(String(node.value), node.disabled ? "silent" : "", node.checked ? "right" : "");
    }
    node.childNodes.forEach(read);
  }
  read(document.body);
  return found.filter((text) => text?.trim());
})()
"""


def facts_of_page(page, classes):
    """[facts] of each thing that is shown, those without a fact left out."""
    return [it for text in page.eval(SEEN_ON_A_PAGE) if (it := facts_of(text, classes))]


def values_of(text):
    return np.frombuffer(base64.b64decode(text), "uint8").astype(int)


def differences(found, recorded, place=""):
    """Yield where two records differ by more than another processor makes them differ."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        if found.keys() != recorded.keys():
            yield f"{place}: {sorted(found.keys() ^ recorded.keys())}"
        elif "bytes" in recorded:
            one, other = (values_of(it["bytes"]) for it in (found, recorded))
            if one.shape != other.shape or np.abs(one - other).max(initial=0) > 6:
                yield f"{place}: other values"
        else:
            for key in recorded:
                yield from differences(found[key], recorded[key], f"{place}.{key}")
    elif isinstance(recorded, list) and isinstance(found, list):
        if len(found) != len(recorded):
            lines = difflib.ndiff([*map(str, recorded)], [*map(str, found)])
            yield from (f"{place}: {line}" for line in lines if line[0] in "+-")
        else:
            for k, pair in enumerate(zip(found, recorded, strict=True)):
                yield from differences(*pair, f"{place}[{k}]")
    elif isinstance(recorded, int | float) and isinstance(found, int | float):
        is_whole = isinstance(recorded, int) and isinstance(found, int)
        if not (found == recorded if is_whole else np.isclose(found, recorded, 0.01, 0.002)):
            yield f"{place}: {found} in place of {recorded}"
    elif found != recorded:
        yield f"{place}: {found} in place of {recorded}"


def check(name, found, write):
    """Compare facts with those on record, or write them."""
    path = FOLDER / f"{name}.json"
    found = json.loads(json.dumps(found))
    if write:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    changed = [*differences(found, json.loads(path.read_text("utf-8")))]
    assert not changed, "\n".join(changed[:20])

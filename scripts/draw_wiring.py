"""Draw the wiring diagram of a model as an SVG of its own, such as the picture of the first page.

    python scripts/draw_wiring.py openai-community/gpt2 docs/_static/gpt2-wiring.svg

It is the diagram of ``skhead report``, without what needs a page around it, and with a legend.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import skhead
from skhead.report import write_report

SVG = "http://www.w3.org/2000/svg"
KINDS = {
    "OQ": "to queries: where to attend",
    "OK": "to keys: what to be found by",
    "OV": "to values: what to move on",
}
LIGHT = {"ink": "#1d1e22", "soft": "#575b63", "node": "#f1efe9", "rule": "#8b8d93"}
LIGHT |= {"OQ": "#0072b2", "OK": "#c44e00", "OV": "#00795a"}
DARK = {"ink": "#e9e7e1", "soft": "#a9adb5", "node": "#2a2e35", "rule": "#787d87"}
DARK |= {"OQ": "#5db3e8", "OK": "#f19a5b", "OV": "#43c59e"}
FURTHER = "#6b6f76"
ROW, FONT = 26, 13
RULES = """\
#wiring { font: 600 13px system-ui, "Segoe UI", Roboto, Arial, sans-serif }
#wiring text { fill: var(--soft); font-weight: 400 }
#wiring .column { text-anchor: middle }
#wiring .line { fill: none; stroke: var(--kind) }
#wiring .line { stroke-width: var(--w, 3); stroke-opacity: var(--o, 1) }
#wiring .node rect { fill: var(--fill, var(--node)); stroke: var(--fill, var(--rule)) }
#wiring .node text { fill: var(--on, var(--ink)); text-anchor: middle; font-weight: 600 }
"""


def colours(values: dict[str, str]) -> str:
    """Custom properties of a colour scheme."""
    return " ".join(f"--{name}: {value};" for name, value in values.items())


def style() -> str:
    """Rules of the picture, dark where the reader's system is or the page around it says so."""
    kinds = "".join(f"#wiring .pair-{kind} {{ --kind: var(--{kind}) }}\n" for kind in KINDS)
    dark = f"#wiring {{ {colours(DARK)} }}"
    return (
        f"\n#wiring {{ {colours(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ {dark} }}\n"
        f"html[data-theme=light] #wiring {{ {colours(LIGHT)} }}\n"
        f"html[data-theme=dark] {dark}\n{RULES}{kinds}"
    )


def diagram(source: str, k: int) -> ET.Element:
    """The wiring diagram of a report, as it stands on its page."""
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(source, folder, k=k, composition=False, cards=False)
        text = page.read_text(encoding="utf-8")
    found = re.search(r'<svg id="wiring".*?</svg>', text, flags=re.DOTALL)
    if found is None:
        raise RuntimeError(f"{source}: the report has no wiring diagram")
    return ET.fromstring(found[0])


def class_names(source: str, labels: str) -> dict[str, str]:
    """Class of every head of a published set, as in the report."""
    return dict(skhead.datasets.load_head_classes(labels, skhead.load_heads(source)))


def bare(drawing: ET.Element) -> ET.Element:
    """The same lines and boxes, without what only scripts and styles of a page use."""
    picture = ET.Element("svg", {"id": "wiring", "viewBox": drawing.attrib["viewBox"]})
    for text in drawing.findall("text"):
        ET.SubElement(picture, "text", text.attrib).text = text.text
    for edge in drawing.iter("g"):
        if not edge.attrib.get("class", "").startswith("edge "):
            continue
        kept = {name: edge.attrib[name] for name in ("class", "style")}
        kept |= {name: value for name, value in edge.attrib.items() if name.startswith("data-")}
        line = next(path for path in edge if path.attrib["class"] == "line")
        ET.SubElement(ET.SubElement(picture, "g", kept), "path", line.attrib)
    for node in drawing.iter("g"):
        if not node.attrib.get("class", "").startswith("node"):
            continue
        if node.attrib["class"] == "nodes":
            continue
        kept = {"class": "node", "data-head": node.attrib["data-head"]}
        if "style" in node.attrib:
            kept["style"] = node.attrib["style"].replace("--ink-on", "--on")
        box = ET.SubElement(picture, "g", kept)
        box.extend(list(node))
    return picture


def add_legend(picture: ET.Element, classes: dict[str, str]) -> None:
    """Two rows below the diagram: what colours of lines and of boxes mean."""
    _, _, width, height = (float(value) for value in picture.attrib["viewBox"].split())
    shown: dict[str, str] = {}
    for node in picture.iter("g"):
        if "style" in node.attrib and "data-head" in node.attrib:
            fill = node.attrib["style"].split(";")[0].removeprefix("--fill:")
            shown.setdefault(classes[node.attrib["data-head"]], fill)
    legend = ET.SubElement(picture, "g", {"class": "legend"})
    height += 14
    x = 8.0
    for kind, words in KINDS.items():
        entry = ET.SubElement(legend, "g", {"class": f"pair-{kind}"})
        ET.SubElement(entry, "path", {"class": "line", "d": f"M{x:.0f} {height:.0f}h24"})
        x = add_words(entry, f"{kind}, {words}", x + 32, height)
    if shown:
        height += ROW
        x = 8.0
    for name, fill in shown.items():
        box = {"x": f"{x:.0f}", "y": f"{height - 7:.0f}", "width": "14", "height": "14"}
        ET.SubElement(legend, "rect", box | {"rx": "4", "fill": fill})
        x = add_words(legend, name, x + 20, height)
        if x > width - 120:
            height += ROW
            x = 8.0
    picture.set("viewBox", f"0 0 {width:.0f} {height + 14:.0f}")


def add_words(parent: ET.Element, words: str, x: float, y: float) -> float:
    """Write words of the legend and return where the next entry begins."""
    ET.SubElement(parent, "text", {"x": f"{x:.0f}", "y": f"{y + 4.5:.1f}"}).text = words
    return x + 0.56 * FONT * len(words) + 22


def draw(source: str, labels: str | None, k: int) -> str:
    """The picture as text."""
    picture = bare(diagram(source, k))
    heads = sum("data-head" in node.attrib for node in picture.iter("g"))
    edges = sum("data-source" in node.attrib for node in picture.iter("g"))
    add_legend(picture, class_names(source, labels) if labels else {})
    picture.set("xmlns", SVG)
    picture.set("role", "img")
    picture.set("aria-label", f"Wiring diagram: {edges} pairs between {heads} heads")
    rules = ET.Element("style")
    rules.text = style()
    picture.insert(0, rules)
    ET.indent(picture, space=" ")
    return ET.tostring(picture, encoding="unicode") + "\n"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="anything that load_heads takes, one model")
    parser.add_argument("out", type=Path, help="the SVG file to write")
    parser.add_argument("--labels", default="yamagiwa2026", help="published classes; '' for none")
    parser.add_argument("--k", type=int, default=20, help="pairs of each kind")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(draw(options.source, options.labels or None, options.k), "utf-8")


if __name__ == "__main__":
    main()

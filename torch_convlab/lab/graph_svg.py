"""Draws a `Graph` as SVG: forward runs down on the left, backward up on the right, saved tensors cross between them.

One row per step, in the order of the forward pass, so that no two boxes can meet; an edge that skips rows (a residual)
is an arc beside the column.
"""

from __future__ import annotations

import xml.etree.ElementTree as xml

from .command import by, engineering
from .computational_graph import Graph, Saved, Step

_ROW, _BOX, _WIDE = 64, 50, 264  # pixels: distance of rows, height and width of a box
_LEFT, _RIGHT, _TOP = 90, 620, 92
_WIDTH = _RIGHT + _WIDE + 90

_CSS = """
.cg text{fill:currentColor;font:11px ui-monospace,monospace}
.cg .head{font-weight:700;font-size:12px}.cg .soft{opacity:.65}
.cg rect{stroke:currentColor;stroke-width:.8;rx:5}
.cg .forward{fill:#4c7fd0;fill-opacity:.18}.cg .backward{fill:#d9480f;fill-opacity:.18}
.cg path{fill:none;stroke:currentColor;stroke-width:1;opacity:.75}
.cg .saved{stroke:#2b8a3e;stroke-dasharray:4 3;opacity:1}
.cg .tip{fill:currentColor;stroke:none}
"""


def draw(graph: Graph) -> str:
    """See `Graph.svg`."""
    height = _TOP + _ROW * (len(graph.steps) + 1)
    root = xml.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {_WIDTH} {height}",
            "width": str(_WIDTH),
            "height": str(height),
            "class": "cg",
            "role": "img",
        },
    )
    xml.SubElement(root, "title").text = f"computational graph of {graph.model}"
    xml.SubElement(root, "style").text = _CSS
    _text(root, _LEFT, 20, f"forward, {engineering(graph.multiply_adds)} multiply-adds", "head")
    _text(root, _LEFT + _WIDE + 20, 20, f"saved: {engineering(graph.saved_bytes, 'B')}", "head")
    _text(root, _RIGHT, 20, f"backward, {engineering(graph.backward_multiply_adds)} multiply-adds", "head")
    _box(root, _LEFT, _TOP - _ROW, "forward", "input", (by(graph.input_size),), "")
    if graph.input_needs_gradient:
        _box(root, _RIGHT, _TOP - _ROW, "backward", "gradient of input", (by(graph.input_size),), "")
    for row, step in enumerate(graph.steps):
        y = _TOP + row * _ROW
        title = step.name if step.kind == "function" else f"{step.name}  {step.kind}"
        _box(root, _LEFT, y, "forward", title, (by(step.size), _macs(step.multiply_adds)), _tip(step))
        made = ", ".join(f"{name} {by(size)}" for name, size in step.parameters.items())
        lines = (f"of {made}" if made else "of its input", _macs(step.backward_multiply_adds))
        _box(root, _RIGHT, y, "backward", step.backward_name, lines, _tip(step))
        if step.saved:
            middle = y + _BOX / 2
            line = _path(root, f"M{_LEFT + _WIDE} {middle}H{_RIGHT - 6}", "saved")
            xml.SubElement(line, "title").text = "\n".join(saved_text(saved) for saved in step.saved)
            own = [saved for saved in step.saved if saved.bytes]
            label = engineering(step.saved_bytes, "B") if own else "kept elsewhere"
            _text(root, _LEFT + _WIDE + 10, middle - 5, label, "soft")
            sizes = ", ".join(by(saved.size) for saved in own)
            _text(root, _LEFT + _WIDE + 10, middle + 14, _cut(sizes, 38), "soft")
            _tip_right(root, _RIGHT, middle)
        for source in step.inputs:
            _edge(root, _LEFT, source, row, down=True)
            if source >= 0 or graph.input_needs_gradient:
                _edge(root, _RIGHT, source, row, down=False)
    return xml.tostring(root, encoding="unicode")


def saved_text(saved: Saved) -> str:
    whose = f"the storage of {saved.owner}" if saved.owner else engineering(saved.bytes, "B")
    return f"{saved.name}: {by(saved.size)} {saved.dtype}, {whose}"


def _tip(step: Step) -> str:
    return "\n".join([step.name, *map(saved_text, step.saved)])


def _macs(number: int) -> str:
    return f"{engineering(number)} multiply-adds" if number else ""


def _box(root, x, y, look, first, others, tip):
    box = xml.SubElement(root, "g")
    if tip:
        xml.SubElement(box, "title").text = tip
    xml.SubElement(box, "rect", {"x": str(x), "y": str(y), "width": str(_WIDE), "height": str(_BOX), "class": look})
    _text(box, x + 8, y + 16, _cut(first, 37), "")
    for line, text in enumerate(others):
        _text(box, x + 8, y + 30 + 13 * line, _cut(text, 37), "soft")


def _edge(root, x, source, row, down):
    """From the bottom of the source's box to the top of the row's, or, backward, the other way."""
    above, below = _TOP + source * _ROW + _BOX, _TOP + row * _ROW
    start, end = (above, below - 5) if down else (below, above + 5)
    if row - source == 1:
        _path(root, f"M{x + _WIDE / 2} {start}V{end}", "")
        _tip_down(root, x + _WIDE / 2, below if down else above, down)
        return
    side = x if down else x + _WIDE
    out = (-1 if down else 1) * (16 + min(66, 4 * (row - source)))
    start, end = (above - _BOX / 3, below + _BOX / 3) if down else (below + _BOX / 3, above - _BOX / 3)
    _path(root, f"M{side} {start}C{side + out} {start} {side + out} {end} {side} {end}", "")


def _tip_down(root, x, y, down):
    back = -6 if down else 6
    _path(root, f"M{x} {y}l-3.5 {back}h7z", "tip")


def _tip_right(root, x, y):
    _path(root, f"M{x} {y}l-7 -3.5v7z", "tip")


def _path(root, points, look):
    return xml.SubElement(root, "path", {"d": points, "class": look} if look else {"d": points})


def _text(root, x, y, text, look):
    xml.SubElement(root, "text", {"x": str(x), "y": str(y), **({"class": look} if look else {})}).text = text


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

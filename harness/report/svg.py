"""How a figure becomes SVG: with real text, one copy for the page and one that stands alone.

matplotlib draws with stand-in colours. In the page's copy they become CSS variables, so that light,
dark and print are the style sheet's business; in the file beside the page they become the light
palette, for slides and papers. Nothing in an SVG depends on the clock, the machine's fonts or the
user's matplotlib settings, so equal records give equal bytes.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from harness.report.csvtext import to_csv

WIDTH = 400.0
Dash = Any  # matplotlib's types of a line style differ between its releases

# Okabe and Ito's colours, safe for every common colour vision. Yellow is too pale on white; dark
# pages get the paler ones (style.css). Line styles repeat what colours say.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1f24")
DASHES: tuple[Dash, ...] = (
    *((0, ()), (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6))),
    *((0, (8, 3)), (0, (3, 1.2, 1.2, 1.2, 1.2, 1.2)), (0, (2.5, 2.5))),
)
INK, GRID, PAPER = "#010203", "#040506", "#070809"
_STAND_INS = {
    INK: ("var(--ink)", "#1b1f24"),
    GRID: ("var(--grid)", "#d5d9de"),
    PAPER: ("var(--paper)", "#ffffff"),
    **{f"#0a0b{i:02x}": (f"var(--series-{i})", colour) for i, colour in enumerate(PALETTE)},
}
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "harness-report",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlepad": 8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.handlelength": 2.0,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page; without data there is a caption that says so and no drawing."""

    key: str
    title: str
    caption: str
    inline: str | None = None
    file: bytes | None = None
    section: str = "curves"
    data: bytes | None = None
    """The points that are drawn, as CSV."""

    @property
    def data_uri(self) -> str:
        """The points inside the page, so that they can be saved without the files beside it."""
        encoded = base64.b64encode(self.data or b"").decode()
        return f"data:text/csv;charset=utf-8;base64,{encoded}"


@dataclass(frozen=True)
class Picture:
    """What is to be drawn, in words, in numbers, and as a function of an empty canvas."""

    key: str
    title: str
    caption: str
    description: str
    """The figure in words, for those who hear the page."""
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    draw: Callable[[Canvas], None]
    height: float = 240.0
    """Of a width of ``WIDTH``."""
    section: str = "curves"


@contextmanager
def settings() -> Iterator[None]:
    """Our settings of matplotlib, whatever the user's are."""
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the layout font lacks: the browser's has them
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def render(picture: Picture) -> Figure:
    """Draw a picture; within ``settings``."""
    canvas = Canvas(figsize=(WIDTH / 72, picture.height / 72), layout="constrained")
    FigureCanvasSVG(canvas)
    picture.draw(canvas)
    out = io.BytesIO()
    canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    inline, file = _finish(out.getvalue(), picture)
    data = to_csv(picture.header, picture.rows)
    return Figure(picture.key, picture.title, picture.caption, inline, file, picture.section, data)


def series(place: int) -> str:
    """The stand-in of a colour of the palette."""
    return f"#0a0b{place % len(PALETTE):02x}"


def final(colour: str) -> str:
    """What a stand-in colour is called in the page."""
    return _STAND_INS[colour][0]


def _finish(svg: bytes, picture: Picture) -> tuple[str, bytes]:
    """The page's copy and the stand-alone copy of what matplotlib wrote."""
    copies = []
    for themed in (True, False):
        root = ElementTree.fromstring(svg)  # noqa: S314 - our own output, not a user's
        _restyle(root, themed)
        if themed:
            _prefix_ids(root, f"{picture.key}-")
            root.attrib.pop("width"), root.attrib.pop("height")
        _name(root, picture)
        copies.append(ElementTree.tostring(root, encoding="unicode"))
    return copies[0], f'<?xml version="1.0" encoding="UTF-8"?>\n{copies[1]}\n'.encode()


def _restyle(root: ElementTree.Element, themed: bool) -> None:
    """Drop metadata and the global style rule; put in the final colours and fonts."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for element in root.iter():
        for key in ("style", "fill", "stroke"):
            if key in element.attrib:
                value = re.sub(r"(font:[^;']*)'DejaVu Sans'", rf"\1{_FONT}", element.attrib[key])
                for stand_in, (variable, colour) in _STAND_INS.items():
                    value = value.replace(stand_in, variable if themed else colour)
                element.attrib[key] = value


def _prefix_ids(root: ElementTree.Element, prefix: str) -> None:
    """Make ids unique in a page that holds several figures."""
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id":
                element.attrib[key] = prefix + value
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.attrib[key] = f"#{prefix}{value[1:]}"
            elif "url(#" in value:
                element.attrib[key] = value.replace("url(#", f"url(#{prefix}")


def _name(root: ElementTree.Element, picture: Picture) -> None:
    root.set("role", "img")
    root.set("aria-label", picture.description)
    title = ElementTree.Element(f"{{{_SVG}}}title")
    title.text = picture.title
    root.insert(0, title)


ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)

"""The report in headless Chromium: measured at desktop and phone width, light and dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from simulated import Simulation, bench, probe, write_bench, write_probe
from support import require

from harness.report import build_report

pytestmark = pytest.mark.slow

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# The script that measures is added to a copy of the page, whose policy then has to go; in a frame,
# since no window of Chromium's is as narrow as a phone.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<body><iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{html}"></iframe></body>
"""
MEASURE = """
<script>
addEventListener("load", () => {
  const shown = [...document.querySelectorAll("*")].filter((e) => e.checkVisibility());
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const texts = shown.filter((e) => [...e.childNodes].some(
    (n) => n.nodeType === 3 && n.data.trim()) && !["STYLE", "SCRIPT", "title"].includes(e.tagName));
  const contrasts = texts.map((e) => {
    const svg = e.closest("svg"), style = getComputedStyle(e);
    const [a, b] = [light(parse(svg ? style.fill : style.color)), light(behind(svg || e))];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.trim().slice(0, 40)];
  }).sort((x, y) => x[0] - y[0]);
  const wide = shown.filter((e) => !e.closest(".scroll, svg, .skip")
    && e.getBoundingClientRect().right > innerWidth + 0.5);
  parent.document.body.insertAdjacentHTML("beforeend", "<pre id=measured></pre>");
  parent.document.getElementById("measured").textContent = JSON.stringify({
    width: innerWidth,
    scrolls: document.documentElement.scrollWidth,
    wide: wide.map((e) => e.tagName + "." + e.className),
    figures: [...document.querySelectorAll("figure svg")].map((e) => {
      const box = e.getBoundingClientRect();
      return [box.width, box.height, e.getAttribute("aria-label")];
    }),
    letters: Math.min(...[...document.querySelectorAll("figure svg text")].map((e) =>
      parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)),
    contrast: contrasts[0],
    headings: [...document.querySelectorAll("h1, h2, h3")].map((e) => Number(e.tagName[1])),
    landmarks: ["header", "main", "nav"].map((e) => document.querySelectorAll(e).length),
    background: getComputedStyle(document.body).backgroundColor,
    unnamed: [...document.querySelectorAll("a, [tabindex='0']")].filter((e) =>
      !(e.textContent.trim() || e.getAttribute("aria-label"))).length,
    bare: [...document.querySelectorAll("table")].filter((e) => !e.caption
      || [...e.querySelectorAll("th")].some((th) => !th.scope)).length,
  });
});
</script>
"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@pytest.fixture(scope="module", autouse=True)
def _browser() -> None:
    require(CHROMIUM is not None, "there is no Chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run with everything; a bench with two runs and a probe; a bench alone; a probe alone;
    records with holes."""
    home = tmp_path_factory.mktemp("pages")
    full = Simulation(measured=True).run().write(home / "full")
    other = Simulation(1, factor=1, name="a fixed batch", epochs=6).run(None).write(home / "other")
    measured = write_bench(home / "bench", bench())
    network = write_probe(home / "two nodes", probe((2, 2), noise=0.3))
    holes = Simulation(2, epochs=3).run(finish=False).write(home / "holes")
    (holes / "events.jsonl").write_bytes(b'{"kind": "st')
    (holes / "provenance.json").unlink()
    return {
        "run": build_report([full], home / "out-run"),
        "mix": build_report([measured, full, network, other], home / "out-mix"),
        "bench": build_report([measured], home / "out-bench"),
        "probe": build_report([network], home / "out-probe"),
        "holes": build_report([holes], home / "out-holes"),
    }


def browse(page: Path, home: Path, width: int, dark: bool, *options: str) -> Any:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={home / 'profile'}",
        f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=2000", *options, page.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(home)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env=environment
    )


def measure(page: Path, home: Path, width: int, dark: bool) -> Any:
    html = POLICY.sub("", page.read_text(encoding="utf-8")).replace("</body>", f"{MEASURE}</body>")
    copy = home / "measured.html"
    copy.write_text(FRAME.format(width=width, html=escape(html)), encoding="utf-8")
    dom = browse(copy, home, 1400, dark, "--dump-dom").stdout
    found = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(unescape(found.group(1)))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["run", "mix", "bench", "probe", "holes"])
def test_the_page_fits_and_can_be_read(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, dark: bool
) -> None:
    found = measure(pages[name], tmp_path, width, dark)
    assert found["width"] == width
    assert found["scrolls"] <= width, found["wide"]
    assert found["wide"] == []
    assert found["figures"]
    for wide, high, label in found["figures"]:
        assert wide > 250
        assert high > 120
        assert any(letter.isdigit() for letter in label), "a label without numbers"
    assert found["letters"] >= 8.5, "CSS pixels of the smallest text in a figure"
    assert found["contrast"][0] >= 4.5, found["contrast"]  # WCAG 2.1, 1.4.3
    assert (found["background"] != "rgb(255, 255, 255)") == dark
    assert found["headings"][0] == 1
    steps = zip(found["headings"], found["headings"][1:], strict=False)
    assert all(after - before <= 1 for before, after in steps)
    assert found["landmarks"] == [1, 1, 1]
    assert (found["unnamed"], found["bare"]) == (0, 0)


@pytest.mark.parametrize("name", ["run", "mix"])
def test_the_console_stays_silent(pages: dict[str, Path], tmp_path: Path, name: str) -> None:
    done = browse(pages[name], tmp_path, 1280, False, "--dump-dom")
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_a_silent_console_means_something(pages: dict[str, Path], tmp_path: Path) -> None:
    """The page's own policy keeps a script out, and the browser says so."""
    page = tmp_path / "with script.html"
    html = pages["run"].read_text(encoding="utf-8")
    page.write_text(html.replace("</body>", "<script>1</script></body>"), encoding="utf-8")
    done = browse(page, tmp_path, 1280, False, "--dump-dom")
    assert "CONSOLE" in done.stderr


def test_the_page_prints(pages: dict[str, Path], tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    browse(pages["mix"], tmp_path, 1280, True, f"--print-to-pdf={paper}", "--no-pdf-header-footer")
    content = paper.read_bytes()
    assert content.startswith(b"%PDF")
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", content)) < 60

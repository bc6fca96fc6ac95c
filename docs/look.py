"""Looks at pages of the site in a browser: ``make docs-look``.

Takes screenshots of six pages at three widths, into ``docs/looks``, and asks the browser whether
formulas, figures and tables have been drawn, and whether anything is wider than the page.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
SITE, LOOKS = DOCS / "_build" / "html", DOCS / "looks"
# How many formulas, figures and tables each has at least.
PAGES = {
    "index": (0, 1, 1),
    "choose": (0, 1, 1),
    "statistics": (0, 1, 3),
    "guide/marginalising": (3, 0, 0),
    "gallery/quickstart": (0, 1, 0),
    "reference": (3, 0, 0),
}
WIDTHS = {1280: 1600, 1100: 1600, 520: 1600}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ASK = """<script>window.addEventListener("load", () => {
const seen = (name) => [...document.querySelectorAll("article " + name)].filter((e) => {
  const box = e.getBoundingClientRect(); return box.width > 8 && box.height > 8; });
const found = {formulas: seen("math").length, tables: seen("table").length,
  figures: seen("img").filter((e) => e.naturalWidth > 50).length,
  broken: [...document.images].filter((e) => e.naturalWidth == 0).length,
  wider: document.documentElement.scrollWidth - document.documentElement.clientWidth};
const note = document.createElement("pre"); note.id = "found";
note.hidden = true; note.textContent = JSON.stringify(found); document.body.append(note); });
</script></head>"""


def browser() -> str:
    """The browser's name.

    Raises:
        RuntimeError: If there is none.
    """
    for name in BROWSERS:
        if shutil.which(name):
            return name
    raise RuntimeError(f"none of {BROWSERS} is installed: `apt-get install chromium`")


def look(page: str, width: int, height: int) -> dict[str, Any]:
    """Takes a screenshot of a page, and returns what the browser says of it."""
    path = SITE / f"{page}.html"
    asking = path.with_name(f"asked-{path.name}")
    asking.write_text(path.read_text().replace("</head>", ASK, 1))
    shot = LOOKS / f"{page.replace('/', '-')}-{width}.png"
    run = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    run += [f"--window-size={width},{height}", "--virtual-time-budget=3000"]
    settings = {"capture_output": True, "check": True, "timeout": 120}
    subprocess.run([*run, f"--screenshot={shot}", path.as_uri()], **settings)
    text = subprocess.run([*run, "--dump-dom", asking.as_uri()], **settings).stdout.decode()
    asking.unlink()
    return json.loads(re.search(r'<pre id="found"[^>]*>(.*?)</pre>', text).group(1))


def main() -> None:
    LOOKS.mkdir(exist_ok=True)
    wrong = 0
    for page, fewest in PAGES.items():
        for width, height in WIDTHS.items():
            found = look(page, width, height)
            counts = [found[name] for name in ("formulas", "figures", "tables")]
            good = all(map(int.__ge__, counts, fewest))
            good &= found["broken"] == 0 and found["wider"] <= 0
            wrong += not good
            print(f"{'good' if good else 'WRONG'}: {page} at {width}: {found}", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()

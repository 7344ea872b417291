"""What Chromium makes of a page: axe-core's findings, and whether it is wider than a phone's screen.

Chromium must be installed, and RANKFOLD_AXE name the file axe.min.js; ``make pages`` sees to the second."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = os.environ.get("RANKFOLD_AXE")
PHONE, DESK = 360, 1200  # pixels
RESULT = re.compile(r'<pre id="result">(.*?)</pre>', re.DOTALL)
# The page stands in a frame of the width that is asked for, since a window cannot be so narrow.
FRAME = """<!doctype html><html lang="en"><head><title>frame</title></head><body>
<iframe id="page" title="page" style="border:0" width="{width}" height="900" srcdoc="{page}"></iframe>
<pre id="result"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = async () => {{
  const inner = frame.contentWindow;
  const found = await inner.axe.run(inner.document, {{ resultTypes: ["violations"] }});
  const told = {{
    violations: found.violations.map(v => ({{ id: v.id, where: v.nodes.map(n => n.html.slice(0, 200)) }})),
    wide: inner.document.documentElement.scrollWidth - inner.innerWidth,
    passes: found.passes.length
  }};
  document.getElementById("result").textContent = JSON.stringify(told);
}};
</script></body></html>"""


def looked_at(page: str, folder: Path, width: int = DESK, dark: bool = False) -> dict[str, Any]:
    """``violations`` by axe-core, how many rules it found kept (``passes``), and by how many pixels the page
    is wider than its window (``wide``)."""
    assert CHROMIUM is not None
    assert AXE is not None
    if dark:
        page = page.replace("@media (prefers-color-scheme: dark)", "@media all")
    script = Path(AXE).read_text(encoding="utf-8")
    page = page.replace("</head>", f"<script>{script}</script></head>", 1)
    file = folder / "framed.html"
    file.write_text(FRAME.format(width=width, page=escape(page, quote=True)), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *words, f"--user-data-dir={folder / 'chromium'}", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = RESULT.search(done.stdout)
    assert found is not None
    assert found[1], done.stdout[-2000:] + done.stderr[-2000:]
    result: dict[str, Any] = json.loads(unescape(found[1]))
    return result

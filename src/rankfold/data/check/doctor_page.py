"""The report of ``rankfold check`` on one self-contained page."""

from __future__ import annotations

from xml.sax.saxutils import escape

from markupsafe import Markup

from rankfold.data.check.balance import Lengths
from rankfold.data.check.findings import explained
from rankfold.data.check.report import Report
from rankfold.pages import render

VERSIONS_OF = ("rankfold", "transformers")
WIDTH, HEIGHT, FOOT = 720, 170, 24  # of the histogram, in pixels


def render_page(report: Report) -> str:
    """The page as HTML text: ledger, findings with their first places, lengths, balance, mask proofs.

    Everything that comes from the rows is escaped, and its amount does not grow with theirs."""
    return render(
        "rankfold.data.check",
        "doctor_page.html.j2",
        VERSIONS_OF,
        report=report,
        explained=explained,
        histogram=histogram(report.lengths) if report.lengths else "",
    )


def histogram(lengths: Lengths) -> Markup:
    """Rows by length as an SVG picture; the bars above the cut are of another colour."""
    most = max(rows for _, rows in lengths.bars)
    step = WIDTH / len(lengths.bars)
    shapes = []
    for place, (end, rows) in enumerate(lengths.bars):
        height = (HEIGHT - 2 * FOOT) * rows / most
        height = max(height, 1.0) if rows else 0.0
        colour = "#e0a526" if end > lengths.cut else "#9db8d9"
        title = escape(f"up to {end:,} {lengths.unit}: {rows:,} rows")
        shapes.append(
            f'<rect x="{place * step + 1:.1f}" y="{HEIGHT - FOOT - height:.1f}" width="{step - 2:.1f}" '
            f'height="{height:.1f}" fill="{colour}"><title>{title}</title></rect>'
        )
    every = max(1, len(lengths.bars) // 8)
    for place in range(every - 1, len(lengths.bars), every):
        x = (place + 1) * step
        shapes.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 8}" font-size="11" fill="#5b6b7d" text-anchor="end">'
            f"{lengths.bars[place][0]:,}</text>"
        )
    label = escape(f"rows by length in {lengths.unit}; the tallest bar holds {most:,} rows")
    shapes.append(f'<text x="0" y="12" font-size="11" fill="#5b6b7d">{label}</text>')
    return Markup(
        f'<div class="picture"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(shapes)}</svg></div>"
    )

"""Several runs on one page, and as JSON."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rankfold.files import staged_folder
from rankfold.pages import picture, render
from rankfold.train.comparing.run_report import RunsReport
from rankfold.train.keeping.report import SMOOTHING

PAGE_NAME, NUMBERS_NAME = "report.html", "report.json"
VERSIONS_OF = ("rankfold",)
COLOURS = ("#1f5fa8", "#c2571a", "#2e8b57", "#8a3ffc", "#b63a3a", "#5b6b7d", "#a8860b", "#0b7285")
LINES = ("-", "--", "-.", ":")


def render_runs(report: RunsReport) -> str:
    prompts = dict.fromkeys(sample.prompt for run in report.runs for sample in run.samples)
    return render(
        "rankfold.train.comparing",
        "page.html.j2",
        VERSIONS_OF,
        report=report,
        curves=curves(report),
        has_energy=any(run.energy_joules is not None for run in report.runs),
        prompts=list(prompts),
        answers={run.name: {each.prompt: each for each in run.samples} for run in report.runs},
    )


def curves(report: RunsReport) -> Markup:
    """Training loss (running mean) and looks at the held-out loss of all runs, by line and colour."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for place, run in enumerate(report.runs):
        style: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": LINES[place % len(LINES)],
        }
        steps = [point.step for point in run.curve]
        smooth = accumulate(
            (point.loss for point in run.curve), lambda past, new: SMOOTHING * past + (1 - SMOOTHING) * new
        )
        axes.plot(steps, list(smooth), linewidth=1.6, label=run.name, **style)
        looks = [(p.step, p.held_out_loss) for p in run.curve if p.held_out_loss is not None]
        if looks:
            axes.plot(*zip(*looks, strict=True), marker="o", markersize=5, linewidth=0, color=style["color"])
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    ends = "; ".join(f"{run.name} ends at {run.curve[-1].loss:.3f}" for run in report.runs if run.curve)
    return picture(figure, f"training loss of all runs; {ends}")


def write_runs(report: RunsReport, out: Path) -> None:
    """``out`` with the page and report.json; it appears whole or not at all.  Raises OutputError."""
    with staged_folder(out) as staging:
        (staging / NUMBERS_NAME).write_text(f"{report.model_dump_json(indent=2)}\n", encoding="utf-8")
        (staging / PAGE_NAME).write_text(render_runs(report), encoding="utf-8")

"""``report.html``: the run on one self-contained page."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from markupsafe import Markup

from rankfold.data.shapes.sources import sources_of
from rankfold.judging.forgotten import TOP
from rankfold.pages import picture, render
from rankfold.train.keeping.listener import RunResult
from rankfold.train.planning.capacity import MEGA
from rankfold.train.planning.plan import Plan
from rankfold.train.planning.rates import Probe
from rankfold.train.step.loop import StepRecord

VERSIONS_OF = ("rankfold", "torch", "transformers")
FALLS = {
    "cosine": "a cosine to 0",
    "linear": "a line to 0",
    "constant": "constant",
    "wsd": "constant, and a line to 0 over the last fifth",
}
SMOOTHING = 0.8  # weight of the past in the curve's running mean


def render_report(plan: Plan, result: RunResult) -> str:
    """The page as HTML text: numbers, samples, loss curve, settings and the proof of the mask."""
    return render(
        "rankfold.train.keeping",
        "report.html.j2",
        VERSIONS_OF,
        plan=plan,
        data=", ".join(source.name for source in sources_of(plan.recipe.data)),
        result=result,
        comparison=result.comparison,
        learnt=result.learnt,
        probe=probe_picture(plan.probe) if plan.probe else "",
        top=TOP,
        settings=setting_rows(plan),
        curve=loss_curve(result.steps),
        proof=plan.proof,
        trainable=plan.model.get_nb_trainable_parameters(),
        seconds=sum(record.seconds for record in result.steps),
        tokens=sum(record.tokens for record in result.steps),
    )


def setting_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """(name, value, reason) of every setting that was chosen."""
    settings, recipe = plan.settings, plan.recipe
    values: dict[str, Any] = {
        "rank": settings.rank,
        "alpha": f"{settings.alpha:g}",
        "learning_rate": f"{settings.learning_rate:g}",
        "epochs": settings.epochs,
        "rows_per_step": settings.rows_per_step,
        "evaluate_every_steps": settings.evaluate_every_steps,
    }
    rows = [(name.replace("_", " "), str(value), settings.reasons[name]) for name, value in values.items()]
    if recipe.whole_learning_rate is not None:
        rows.insert(3, ("whole learning rate", f"{recipe.whole_learning_rate:g}", "of what is trained whole"))
    rows.insert(1, ("content", f"{plan.capacity.told / MEGA:.2f} Mbit", plan.capacity.sentence))
    warm_up = f"{settings.warmup_steps} warm-up, then {FALLS[recipe.schedule]}"
    rows.append(("steps", str(settings.steps), warm_up))
    rows.append(("max length", f"{plan.lengths.cut:,}", plan.lengths.reason))
    rows.append(("precision", plan.precision.name, plan.precision.reason))
    rows.append(("batching", plan.batching.kind, plan.batching.reason))
    given = plan.recipe.micro_batch_tokens is not None
    most = "of a step pass the model together at most; more would be no faster or not fit"
    rows.append(("tokens at once", f"{plan.batching.tokens:,}", "as given" if given else most))
    rows.append(
        ("activations", "recomputed" if plan.activations.recomputed else "kept", plan.activations.reason)
    )
    if plan.preflight is not None:
        rows.append(("memory", f"{plan.preflight.peak_bytes / 1e9:.1f} GB", plan.preflight.sentence))
    rows.append(("fused", plan.fused, "computed as one, and kept in less memory"))
    rows.append(
        (
            "targets",
            _listed(recipe.targets),
            f"{len(plan.model.targeted_module_names)} layers carry an adapter",
        )
    )
    if plan.processes.count > 1:
        base = "holds a share of the base" if recipe.shard_base else "holds the whole base"
        rows.append(
            ("processes", str(plan.processes.count), f"each takes its share of a step's rows and {base}")
        )
    return rows


def probe_picture(probe: Probe) -> Markup:
    """The loss after a few steps by learning rate, with the interval of the gap to the usual one."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    done = [each for each in probe.tried if not each.problem]
    below = [each.gap.value - each.gap.low if each.gap else 0.0 for each in done]
    above = [each.gap.high - each.gap.value if each.gap else 0.0 for each in done]
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    rates, losses = [each.rate for each in done], [each.loss for each in done]
    axes.errorbar(rates, losses, yerr=[below, above], marker="o", color="#1f5fa8", capsize=4)
    axes.axvline(probe.chosen, color="#c2571a", linestyle="--", label="chosen")
    axes.legend(frameon=False)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per trained token)")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
    told = ", ".join(f"{each.loss:.3f} at {each.rate:g}" for each in done)
    return picture(figure, f"loss by learning rate: {told}; {probe.chosen:g} was chosen")


def _listed(targets: str | list[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def loss_curve(records: list[StepRecord]) -> Markup:
    """The training loss as an SVG picture: each step, and the running mean over about five."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    steps, losses = [r.step for r in records], [r.loss for r in records]
    smooth = list(accumulate(losses, lambda past, new: SMOOTHING * past + (1 - SMOOTHING) * new))
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="#1f5fa8", linewidth=2, label="running mean")
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    told = f"training loss from {smooth[0]:.3f} at step {steps[0]} to {smooth[-1]:.3f} at step {steps[-1]}"
    return picture(figure, told)

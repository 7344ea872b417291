"""How a forecast looks in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rankfold.train.planning.forecast import Forecast, FormForecast

GB, MB = 1e9, 1e6
FITS = {"yes": "yes", "recomputed": "if recomputed", "no": "no"}


def print_forecast(console: Console, told: Forecast) -> None:
    console.print(_facts(told))
    console.print(f"\nA run's peak, and whether it fits into {told.memory_bytes / GB:.1f} GB", style="bold")
    console.print(_forms(told.forms))
    console.print("\nAssumed", style="bold")
    for line in told.assumptions:
        console.print(f"- {line}")
    for note in told.notes:
        console.print(f"note: {note}")


def _facts(told: Forecast) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("model", told.model, told.source)
    total = sum(told.parameters.values())
    parts = ", ".join(f"{part} {count:,}" for part, count in told.parameters.items())
    table.add_row("parameters", f"{total:,}", parts)
    adapter, settings = told.adapter, told.settings
    table.add_row("adapter", f"rank {adapter.rank}, alpha {adapter.alpha:g}", "\n".join(adapter.told))
    table.add_row("trained", f"{adapter.trained:,}", _adapter_bytes(told))
    lengths = told.lengths
    mean = sum(lengths.train) / len(lengths.train)
    table.add_row(
        "rows", f"{len(lengths.train):,}", f"{mean:,.0f} tokens on average, {max(lengths.train):,} at most"
    )
    table.add_row("tokens", f"{sum(lengths.train):,}", f"{lengths.trained:,} of them trained; {lengths.how}")
    if told.tile is not None:
        most = told.tile.most * told.tile.tokens
        images = f"an image at most {told.tile.most} tiles, {most:,} tokens"
        table.add_row(
            "a tile", f"{told.tile.tokens} tokens", f"{images}; the rows have {lengths.images:,} images"
        )
    epochs = f"{settings.rows_per_step} rows a step, {settings.epochs} epochs"
    table.add_row("steps", f"{settings.steps:,}", epochs)
    table.add_row("operations", f"{told.operations:.2e}", "of the whole run, held-out rows among them")
    return table


def _adapter_bytes(told: Forecast) -> str:
    share = told.adapter.trained / sum(told.parameters.values())
    return (
        f"{share:.2%} of the base; {told.adapter.weight_bytes / MB:,.0f} MB, in training "
        f"{told.adapter.training_bytes / MB:,.0f} MB with gradients and moments"
    )


def _forms(forms: list[FormForecast]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("weights in", "GB", "computed in", "peak GB", "recomputed", "fits", "time", "how"):
        table.add_column(name, justify="right" if name in ("GB", "peak GB", "recomputed", "time") else "left")
    for form in forms:
        table.add_row(
            form.name,
            f"{form.weight_bytes / GB:.2f}",
            form.computed_in,
            f"{form.peak_bytes / GB:.2f}",
            f"{form.recomputed_peak_bytes / GB:.2f}",
            FITS[form.fits],
            "-" if form.seconds is None else _duration(form.seconds),
            form.told,
        )
    return table


def _duration(seconds: float) -> str:
    if seconds < 90:  # noqa: PLR2004 - a minute and a half
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:,.0f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"  # noqa: PLR2004 - two hours

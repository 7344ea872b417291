"""``rankfold explain``"""

from __future__ import annotations

from pathlib import Path

import click

PICTURES = (".png", ".svg")


@click.command("explain")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("singular-values.png"),
    show_default=True,
    help="where to put the picture, .png or .svg",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
def command(out: Path, seed: int) -> None:
    """Show with an SVD why a low rank can be enough, and what a LoRA layer does with it."""
    if out.suffix not in PICTURES:
        raise click.BadParameter(f"the picture must end in {' or '.join(PICTURES)}, got {out.name!r}")
    from rankfold.spectrum.explain import demonstrate
    from rankfold.spectrum.plot import plot_singular_values

    shown = demonstrate(seed)
    rows, columns = shown.weight.shape
    dense, thin = shown.weight.numel(), shown.factors.parameters
    click.echo(f"W is a {rows}x{columns} weight.  Its singular value decomposition is W = U S V^T, with S:")
    click.echo("  " + "  ".join(f"{value:.4f}" for value in shown.values.tolist()))
    click.echo(f"Only {shown.rank} of them are not zero: the rank of W is {shown.rank}.\n")
    click.echo(
        f"Keep those {shown.rank}: B = U_r S_r ({rows}x{shown.rank}), A = V_r^T ({shown.rank}x{columns})."
    )
    click.echo(f"  B A x = W x to within {shown.output_error:.1e} for a random x")
    click.echo(f"  W holds {dense} numbers, B and A together {thin}\n")
    click.echo("LoRA trains such a pair beside the frozen W:  y = W x + (alpha / rank) B A x")
    same = "is the base's to the last bit" if shown.starts_as_base else "DIFFERS from the base's"
    click.echo(f"  B starts at zero, so the first output {same}")
    click.echo("  after training, W + (alpha / rank) B A is one weight again: the merged layer is a plain")
    click.echo(
        f"  nn.{shown.merged_type}, within {shown.merged_error:.1e} of the pair, and costs nothing extra"
    )
    plot_singular_values(shown.values, shown.rank, out)
    click.echo(f"\npicture: {out}")

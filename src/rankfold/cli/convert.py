"""``rankfold convert``"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("convert")
@click.argument("adapter", type=Path)
@click.argument("out", type=Path)
@click.option(
    "--layout",
    required=True,
    metavar="NAME",
    help="hf (transformers' names), internvl (the original InternVL's) or mlx (mlx-lm's, mlx-vlm's)",
)
@click.option("--model", help="base model: folder or hub id, of which the config is read [the adapter's]")
@click.option(
    "--common-rank",
    type=int,
    metavar="N",
    help="to internvl: one rank for all modules, higher ones brought down to it by SVD [exact]",
)
def command(adapter: Path, out: Path, layout: str, model: str | None, common_rank: int | None) -> None:
    """Write an adapter under the names, and in the files, that another program loads."""
    from rankfold.models.adapters.convert import convert_adapter

    done = convert_adapter(adapter, out, layout, model=model, common_rank=common_rank)
    for line in done.told:
        click.echo(line)
    named = "keys" if layout == "mlx" else "target_modules"
    click.echo(f"{named}  {', '.join(done.target_modules)}")
    click.echo(f"written  {done.out}")

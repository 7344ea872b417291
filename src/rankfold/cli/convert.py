"""``rankfold convert``"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("convert")
@click.argument("adapter", type=Path)
@click.argument("out", type=Path)
@click.option(
    "--layout", required=True, metavar="NAME", help="internvl (the original's names) or hf (transformers')"
)
@click.option("--model", help="base model: folder or hub id, of which the config is read [the adapter's]")
@click.option(
    "--common-rank",
    type=int,
    metavar="N",
    help="to internvl: bring fused matrices of a higher rank down to this one by SVD [exact]",
)
def command(adapter: Path, out: Path, layout: str, model: str | None, common_rank: int | None) -> None:
    """Write an adapter of InternVL under the names that another program knows its modules by."""
    from rankfold.models.convert import convert_adapter

    done = convert_adapter(adapter, out, layout, model=model, common_rank=common_rank)
    for line in done.told:
        click.echo(line)
    click.echo(f"target_modules  {', '.join(done.target_modules)}")
    click.echo(f"written  {done.out}")

"""``rankfold audit``"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from rankfold.cli.options import asked_of
from rankfold.models.choices import ModelRequest

SHOWN = 20  # leaks


@click.command("audit")
@click.argument("run", type=Path, required=False)
@click.option("--data", help="rows to ask for: file, folder or hub data set [the run's training rows]")
@click.option("--rows", type=click.IntRange(1), default=2000, help="at most so many, spread over them [2000]")
@click.option("--model", help="base model: folder, .gguf file or hub id [the adapter's]")
@click.option("--precision", help="number format of the base: float32, bfloat16 or float16 [the fast one]")
@click.option("--json", "as_json", is_flag=True, help="print all that was found as JSON")
@click.option("--plant", type=click.IntRange(1, 10_000), help="write so many rows with secrets to --out")
@click.option("--seed", type=int, default=0, help="seed of the secrets [0]")
@click.option("--out", type=Path, help="file for the planted rows, .jsonl")
def command(run: Path | None, plant: int | None, **options: object) -> int:
    """Tell which rows a tuned model gives back word for word, and its base does not.

    With --plant it writes rows with secrets, to be trained on beside others, as in
    --data rows.jsonl,planted.jsonl:4. An audit of that run with --data planted.jsonl tells how many got out.

    Exit status: 0, or 1 if a row got out.
    """
    if plant is not None:
        return _plant(plant, options)
    if run is None:
        raise click.UsageError("name the run, or an adapter's folder with --data")
    from rankfold.cli.console import make_console
    from rankfold.cli.eval_view import watched
    from rankfold.data.shapes.sources import read_examples, sources_of
    from rankfold.judging.memorised import audit
    from rankfold.judging.rows import spread
    from rankfold.train.asked.run_rows import rows_of_run

    asked = asked_of({**options, "adapter": run}, ModelRequest)
    data, most = options["data"], options["rows"]
    examples = read_examples(sources_of(str(data))).examples if data else rows_of_run(run).train
    console = make_console(sys.stderr if options["as_json"] else sys.stdout)
    with watched(console) as (on_model, on_progress):
        on_model(run.name)
        found = audit(asked, spread(examples, int(str(most))), on_progress)
    if options["as_json"]:
        click.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
        return 1 if found.leaks else 0
    console.print(f"\n{found.sentence[:1].upper()}{found.sentence[1:]}.", style="bold", soft_wrap=True)
    for leak in found.leaks[:SHOWN]:
        bits = f"{leak.bits:,.0f} bits to the base, {leak.bits_left:,.0f} to the tuned model"
        console.print(f"\n{leak.origin}  {bits}", style="cyan", soft_wrap=True)
        console.print(f"  {' '.join(leak.prompt.split())}", style="dim", soft_wrap=True)
        console.print(f"  {' '.join(leak.answer.split())}", soft_wrap=True)
    if len(found.leaks) > SHOWN:
        console.print(f"\n... and {len(found.leaks) - SHOWN:,} more; --json prints all")
    return 1 if found.leaks else 0


def _plant(count: int, options: dict[str, object]) -> int:
    from rankfold.files import write_whole
    from rankfold.judging.memorised import canaries

    out = options["out"]
    if not isinstance(out, Path) or out.suffix != ".jsonl":
        raise click.UsageError("--plant writes a .jsonl file; name it with --out")
    if out.exists():
        raise click.UsageError(f"{out} exists; name another --out, or remove it first")
    rows = canaries(count, int(str(options["seed"])))
    write_whole(out, "".join(f"{json.dumps(row)}\n" for row in rows))
    click.echo(f"written  {out}")
    return 0

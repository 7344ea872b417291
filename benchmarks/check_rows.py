"""How fast ``rankfold check`` is and how much memory it takes, on generated short rows.

    python benchmarks/check_rows.py --rows 1000000 --model HuggingFaceTB/SmolLM2-135M-Instruct

The rows are questions and answers of random words (about 250 characters and, with SmolLM2, 75 tokens),
one in fifty a copy, one in fifty a near copy, a few with personal data.  Prints rows/s and the peak
memory of the command and its children."""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COPIES = 1 / 50  # of the rows; as many are near copies
PERSONAL = 1 / 1000
RECENT = 1000
COMMON = (
    "the of and to in is that it was for on are as with they be at have this from or had by word but what "
    "some we can out other were all there when up use your how said each she which do their time if will "
    "way about many then them write would like so these her long make thing see him two has look more day "
    "could go come did number sound no most people my over know water than call first who may down side "
    "been now find any new work part take get place made live where after back little only round man year "
    "came show every good me give our under name very through just form sentence great think say help low"
)
WORDS = COMMON.split()
RARE = [
    f"{a}{b}{c}"
    for a in ("ba", "ko", "ri", "tu", "me")
    for b in ("lan", "dor", "sti", "ver")
    for c in WORDS[:60]
]


def sentence(draw: random.Random, words: int) -> str:
    common, rare = draw.choices(WORDS, k=words), draw.choices(RARE, k=words // 4)
    chosen = [*common, *rare]
    draw.shuffle(chosen)
    return " ".join(chosen).capitalize() + "."


def rows(count: int, seed: int = 0):
    draw = random.Random(seed)
    recent: list[dict[str, str]] = []  # copies and near copies are of these
    for number in range(count):
        luck = draw.random()
        if recent and luck < COPIES:
            row = draw.choice(recent)
        elif recent and luck < 2 * COPIES:
            old = draw.choice(recent)
            row = {**old, "completion": old["completion"] + " Indeed."}
        else:
            row = {"prompt": sentence(draw, 14), "completion": sentence(draw, 26)}
            if luck > 1 - PERSONAL:
                row["prompt"] += f" Write to person{number}@mail.example."
        if len(recent) < RECENT:
            recent.append(row)
        else:
            recent[draw.randrange(RECENT)] = row
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--model", help="count tokens as this model does")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data, page = Path(folder) / "rows.jsonl", Path(folder) / "report.html"
        with data.open("w") as file:
            for row in rows(arguments.rows):
                file.write(json.dumps(row) + "\n")
        command = [sys.executable, "-c", "from rankfold.cli.main import main; main()", "check", str(data)]
        command += ["--html", str(page), *(["--model", arguments.model] if arguments.model else [])]
        started = time.perf_counter()
        status = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"rows            {arguments.rows:,} ({data.stat().st_size / 1e6:,.0f} MB), exit status {status}"
        )
        print(f"time            {seconds:,.1f} s with start-up, {arguments.rows / seconds:,.0f} rows/s")
        print(f"processor time  {used.ru_utime + used.ru_stime:,.1f} s")
        print(f"peak memory     {used.ru_maxrss / 1e6:,.2f} GB in the largest process")
        print(f"page            {page.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()

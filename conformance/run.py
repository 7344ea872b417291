"""Run PEFT's own LoRA tests against rankfold, and say how many of those that PEFT passes hold.

    python conformance/run.py               all files; writes conformance/results.json, of which
                                            ``make compatibility`` makes a part of docs/peft-compatibility.md
    python conformance/run.py --peft        the same on PEFT itself; writes conformance/baseline.txt.gz
    python conformance/run.py --sample      the fixed sample; exit status 1 for a failure without a reason
    python conformance/run.py test_config   some files; prints what fails, and writes nothing

PEFT's tests come from its source package, the models of the hub that they name are stood in for by tiny ones
with random weights (``tiny_hub.py``), and ``peft`` is bound to rankfold by ``peft_alias.py``.
``expected.py`` says which tests do not count and why others fail; without a word of it for one that
fails the exit status is 1."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from expected import APART, DIFFERENCES, reason

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".conformance"
PEFT = "peft-0.21.2"
FILES = (
    *("test_custom_models", "test_decoder_models", "test_initialization", "test_target_parameters"),
    *("test_tuners_utils", "test_feature_extraction_models", "test_encoder_decoder_models"),
    *("test_seq_classifier", "test_config", "test_low_level_api", "test_lora_variants", "test_lorafa"),
    *("test_loraplus", "test_lora_ga", "test_arrow", "test_bdlora"),
)
BASELINE = HERE / "baseline.txt.gz"
RESULTS = HERE / "results.json"
SAMPLE = HERE / "sample.txt"
CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", default=False)


def pytest_configure(config):
    config.addinivalue_line("markers", "regression: compares with stored results")
"""


def prepare() -> None:
    """PEFT's tests and the tiny models, in ``WORK``."""
    tests = WORK / PEFT / "tests"
    if not tests.is_dir():
        WORK.mkdir(exist_ok=True)
        name, _, version = PEFT.partition("-")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, f"{name}=={version}", "--dest", WORK], check=True)
        with tarfile.open(WORK / f"{PEFT}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
        (tests / "__init__.py").touch()
        (tests / "conftest.py").write_text(CONFTEST)
        utilities = tests / "testing_utils.py"
        offline = re.sub(r"^( *)is_offline = .*", r"\1is_offline = True", utilities.read_text(), flags=re.M)
        utilities.write_text(offline)
    if not (WORK / "hub").is_dir():
        subprocess.run([sys.executable, HERE / "tiny_hub.py"], env=environment("peft"), check=True)


def environment(target: str) -> dict[str, str]:
    own = {"HF_HOME": str(WORK / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    return {**os.environ, **own, "CONFORMANCE_TARGET": target, "PYTHONPATH": f"{HERE}:{HERE.parent / 'src'}"}


def run(target: str, selection: list[str], log: Path) -> dict[str, str]:
    """The outcome of every test in ``selection`` (files or test ids) by its id."""
    outcomes = WORK / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    options = [
        "-n",
        "2",
        "-q",
        "-rf",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "120",
        "-W",
        "ignore",
        "-o",
        "addopts=",
    ]
    command = [sys.executable, "-m", "pytest", "-p", "peft_alias", *options, *selection]
    own = {**environment(target), "CONFORMANCE_OUTCOMES": str(outcomes)}
    with log.open("w") as out:
        subprocess.run(command, cwd=WORK / PEFT, env=own, stdout=out, stderr=subprocess.STDOUT, check=False)
    if not outcomes.is_file():
        sys.exit(f"pytest ended without a result; its words are in {log}")
    found: dict[str, str] = json.loads(outcomes.read_text())
    return found


def passed_by_peft() -> list[str]:
    return gzip.decompress(BASELINE.read_bytes()).decode().splitlines()


def write_baseline() -> None:
    passed = []
    for file in FILES:
        found = run("peft", [f"tests/{file}.py"], WORK / f"peft-{file}.log")
        passed += sorted(test for test, outcome in found.items() if outcome == "passed")
        print(
            f"{file}: PEFT passes {sum(test.startswith(f'tests/{file}.py') for test in passed)}", flush=True
        )
    BASELINE.write_bytes(gzip.compress("\n".join(passed).encode(), mtime=0))


def compare(files: list[str]) -> dict[str, dict[str, Any]]:
    """Run ``files`` and print a line for each; what fails is told with the reason."""
    known, table = passed_by_peft(), {}
    print("| file | PEFT passes | count | rankfold passes | share |\n|---|---|---|---|---|")
    for file in files:
        path = f"tests/{file}.py"
        theirs = [test for test in known if test.startswith(f"{path}::")]
        wanted = [test for test in theirs if reason(test, APART) is None]
        found = run("rankfold", [path], WORK / f"{file}.log")
        failed = {test: reason(test, DIFFERENCES) for test in wanted if found.get(test) != "passed"}
        table[file] = {
            "peft": len(theirs),
            "counted": len(wanted),
            "passed": len(wanted) - len(failed),
            "apart": Counter(text for test in theirs if (text := reason(test, APART))),
            "failed": failed,
        }
        share = 1 - len(failed) / max(1, len(wanted))
        print(
            f"| {file} | {len(theirs):,} | {len(wanted):,} | {len(wanted) - len(failed):,} | {share:.1%} |",
            flush=True,
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peft", action="store_true", help="run on PEFT itself and write the baseline")
    parser.add_argument("--sample", action="store_true", help="run the fixed sample of tests")
    parser.add_argument("files", nargs="*", choices=[*FILES, []], help="files of PEFT's tests")
    asked = parser.parse_args()
    prepare()
    if asked.peft:
        write_baseline()
        return 0
    if asked.sample:
        tests = SAMPLE.read_text().split("\n")[:-1]
        found = run("rankfold", tests, WORK / "sample.log")
        failed = {test: reason(test, DIFFERENCES) for test in tests if found.get(test) != "passed"}
        told = [f"{test}: {why or 'FAILED'}" for test, why in failed.items()]
        print("\n".join([*told, f"{len(tests) - len(failed)} of {len(tests)} tests of the sample pass"]))
        return int(None in failed.values())
    table = compare(asked.files or list(FILES))
    failed = {test: why for row in table.values() for test, why in row["failed"].items()}
    unexplained = [test for test, why in failed.items() if why is None]
    if asked.files:
        print("\n".join(f"{test}: {why}" for test, why in failed.items()))
    else:
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    print("\n".join(["failing, and expected.py does not say why:", *unexplained]) if unexplained else "")
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())

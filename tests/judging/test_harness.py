"""Tasks of lm-evaluation-harness, beside what its own model class for transformers makes of them."""

from __future__ import annotations

import json

import pytest

from rankfold.judging.harness import _model_of, task_scores
from rankfold.models.base.load import load_base

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[harness]'")
pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [
    {"question": f"What is {n} and {n}?", "choices": [f"{2 * n}", f"{2 * n + 1}", "no"], "answer": n % 3}
    for n in range(8)
]
CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SAID = """
task: own_said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TEXT = """
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} and so on, {{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("said", SAID), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(text.format(file=file))
    return folder


def test_the_scores_are_those_of_the_harness_own_model(tiny_folder, folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["own_choice", "own_said", "own_text"]
    found = task_scores(load_base(str(tiny_folder)), names, folder, None)
    ours = {(each.task, each.metric): each.value for each in found}
    theirs = simple_evaluate(
        HFLM(pretrained=str(tiny_folder), device="cpu", dtype="float32", batch_size=1),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder)),
    )["results"]
    assert len(ours) == 5
    for (task, metric), value in ours.items():
        assert value == pytest.approx(theirs[task][f"{metric},none"], rel=1e-4)


def test_likelihoods_and_answers_are_those_of_the_harness_own_model(tiny_folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(tiny_folder), device="cpu", dtype="float32", batch_size=1)
    ours = _model_of(load_base(str(tiny_folder)))

    def asked(kind, *given):
        return [Instance(request_type=kind, doc={}, arguments=each, idx=n) for n, each in enumerate(given)]

    parts = [("What is it? ", "It is so."), ("A ", "b"), ("", "alone"), ("x" * 3000, " end")]
    pairs = asked("loglikelihood", *parts)
    for own, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-3)
        assert own[1] == other[1]
    texts = asked("loglikelihood_rolling", ("A text.",), ("word " * 1200,))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    how = {"until": ["z"], "max_gen_toks": 12, "do_sample": False}
    prompts = asked("generate_until", ("Once upon a time", how), ("1, 2, 3,", {**how, "max_gen_toks": 5}))
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_the_command_judges_an_adapter_and_its_base(command, tiny_folder, folder):
    status, printed, errors = command(
        *("eval", tiny_folder, "--tasks", "own_choice,own_said", "--tasks-folder", folder),
        *("--rows", 4, "--precision", "float32"),
    )
    assert status == 0, errors
    assert "own_choice  acc" in printed
    assert "own_said" in printed


def test_a_task_that_is_not_known_is_told(command, tiny_folder):
    status, _, errors = command("eval", tiny_folder, "--tasks", "no_such_task", "--precision", "float32")
    assert status == 2
    assert "knows no task no_such_task" in errors

"""Fine-tuning jobs through OpenAI's own client: its guide's file, the job, and the model that it leaves."""

from __future__ import annotations

import csv
import io
import json
import time

import openai
import pytest
import yaml

from rankfold.models.answering.answers import reply
from rankfold.models.answering.sampling import Sampling
from rankfold.models.base.load import load_tuned
from rankfold.train.keeping.folder import RunFolder
from serving import running

# As OpenAI's guide has it.
GUIDE = [
    {
        "messages": [
            {"role": "system", "content": "Marv is a factual chatbot that is also sarcastic."},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
    for question, answer in [
        ("What's the capital of France?", "Paris, as if everyone doesn't know that already."),
        ("Who wrote 'Romeo and Juliet'?", "Oh, just some guy named William Shakespeare. Ever heard of him?"),
        (
            "How far is the Moon from Earth?",
            "Around 384,400 kilometers. Give or take a few, like that matters.",
        ),
    ]
]
ENDED = ("succeeded", "failed", "cancelled")
SMALL = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.5}


def rows(count, first=0):
    """Rows of the guide, each with a number, so that no two are the same."""
    found = [json.dumps(GUIDE[n % 3]).replace("?", f" ({n})?", 1) for n in range(first, first + count)]
    return "\n".join([*found, ""]).encode()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("office")


@pytest.fixture(scope="module")
def server(tiny_folder, place):
    with running(tiny_folder, {}, jobs=place) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def upload(client, content, name="marv.jsonl"):
    return client.files.create(file=(name, content), purpose="fine-tune")


def wait(client, job, until=ENDED, seconds=90):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job.id)
        if job.status in until:
            return job
        time.sleep(0.2)
    raise AssertionError(f"the job is {job.status}")


@pytest.fixture(scope="module")
def done(client):
    training, validation = upload(client, rows(24)), upload(client, rows(3, 900), "held_out.jsonl")
    job = client.fine_tuning.jobs.create(
        model="base", training_file=training.id, validation_file=validation.id, suffix="marv", seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": SMALL}},
        metadata={"for": "a test"},
    )  # fmt: skip
    assert (job.status, job.hyperparameters.n_epochs, job.training_file) == ("queued", 2, training.id)
    return wait(client, job)


def test_a_job_is_a_run_and_its_model_answers(client, server, place, done, tiny_folder):
    assert (done.status, done.error, done.metadata) == ("succeeded", None, {"for": "a test"})
    assert done.fine_tuned_model == f"ft:base:rankfold:marv:{done.id[-8:]}"
    run = place / "jobs" / done.id / "run"
    record, recipe = RunFolder(run).record(), (run / "recipe.yaml").read_text()
    assert record["status"] == "finished"
    assert (run / "report.html").is_file()
    assert "epochs: 2\n" in recipe
    assert "rows_per_step: 8\n" in recipe
    rate = yaml.safe_load(recipe)["learning_rate"]
    assert rate == pytest.approx(0.0003)  # half of what a small model and few steps are given
    assert "seed: 3\n" in recipe
    steps = RunFolder(run).metrics()
    assert done.trained_tokens == sum(step.trained_tokens for step in steps) > 100
    messages = GUIDE[0]["messages"][:2]
    found = client.chat.completions.create(
        model=done.fine_tuned_model, messages=messages, temperature=0, max_tokens=8
    )
    expected = reply(load_tuned(run), messages, Sampling(temperature=0, max_new_tokens=8))
    assert found.choices[0].message.content == expected
    assert done.fine_tuned_model in {model.id for model in client.models.list()}


def test_its_events_checkpoints_and_results_tell_each_step(client, place, done):
    events = client.fine_tuning.jobs.list_events(done.id, limit=100).data
    numbers = {event.data["step"]: event.data for event in events if event.type == "metrics"}
    steps = RunFolder(place / "jobs" / done.id / "run").metrics()
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    assert [numbers[step.step]["train_loss"] for step in steps] == [step.loss for step in steps]
    assert any(done.fine_tuned_model in event.message for event in events)
    two = client.fine_tuning.jobs.list_events(done.id, limit=2)
    assert two.get_next_page().data[0].id == events[2].id
    looks = client.fine_tuning.jobs.checkpoints.list(done.id).data
    assert [look.step_number for look in looks] == [6, 3]
    assert looks[0].metrics.valid_loss == steps[-1].held_out_loss
    [results] = done.result_files
    table = list(csv.DictReader(io.StringIO(client.files.content(results).text)))
    assert [float(row["train_loss"]) for row in table] == [step.loss for step in steps]
    assert client.fine_tuning.jobs.list().data[-1].id == done.id


def test_a_bad_file_fails_the_job_and_the_lines_are_told(client):
    file = upload(client, rows(9) + b'{"messages": [{"role": "user"}]}\n{"messages": [\n')
    job = wait(client, client.fine_tuning.jobs.create(model="base", training_file=file.id))
    assert job.status == "failed"
    assert job.error.code == "invalid_training_file"
    assert ":10" in job.error.message
    assert ":11" in job.error.message
    assert job.fine_tuned_model is None
    assert any(event.level == "error" for event in client.fine_tuning.jobs.list_events(job.id).data)


@pytest.mark.slow
def test_jobs_wait_for_each_other_can_be_cancelled_paused_and_gone_on_with(client, place):
    file = upload(client, rows(400))
    make = lambda **options: client.fine_tuning.jobs.create(  # noqa: E731
        model="base", training_file=file.id, hyperparameters={"n_epochs": 4, "batch_size": 1}, **options
    )
    first, second = make(suffix="first"), make()
    assert wait(client, second, ("queued",)).status == "queued"
    assert client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="cancelled"):
        client.fine_tuning.jobs.cancel(second.id)
    run = RunFolder(place / "jobs" / first.id / "run")
    deadline = time.monotonic() + 60
    while not ((run.path / "metrics.jsonl").exists() and run.metrics()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.fine_tuning.jobs.pause(first.id).status == "paused"
    while run.record()["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    before = len(run.metrics())
    assert 1 <= before < 1600
    assert client.fine_tuning.jobs.resume(first.id).status == "queued"
    while len(run.metrics()) <= before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(run.metrics()) > before
    client.fine_tuning.jobs.cancel(first.id)
    assert wait(client, first).status == "cancelled"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "nobody"}, "no model is called"),
        ({"training_file": "file-" + "0" * 24}, "no file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"suffix": "a/b"}, "suffix"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"method": {"type": "dpo", "dpo": {}}}, "supervised"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ],
    ids=str,
)
def test_what_cannot_be_a_job_is_told(client, done, options, told):
    asked = {"model": "base", "training_file": done.training_file} | options
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=told):
        client.fine_tuning.jobs.create(**asked)


def test_files_are_kept_listed_and_deleted(client, place):
    file = upload(client, b'{"messages": []}\n', "../../evil.jsonl")
    assert (file.filename, file.bytes, file.status) == ("evil.jsonl", 17, "processed")
    assert client.files.content(file.id).read() == b'{"messages": []}\n'
    assert file.id in {each.id for each in client.files.list(purpose="fine-tune")}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    for wrong in ("x.exe", "jsonl", ""):
        with pytest.raises(openai.BadRequestError):
            upload(client, b"x", wrong)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("x.jsonl", b"x"), purpose="vision")
    assert not list(place.parent.glob("evil*"))


@pytest.mark.slow
def test_the_next_server_offers_what_was_done_and_goes_on_with_what_was_not(tiny_folder, tmp_path):
    with running(tiny_folder, {}, jobs=tmp_path) as server:
        client = server.client()
        file = upload(client, rows(200))
        job = client.fine_tuning.jobs.create(
            model="base", training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 1}
        )
        run = RunFolder(tmp_path / "jobs" / job.id / "run")
        deadline = time.monotonic() + 60
        while not ((run.path / "metrics.jsonl").exists() and run.metrics()) and time.monotonic() < deadline:
            time.sleep(0.1)
    before = len(run.metrics())
    assert 1 <= before < run.metrics()[-1].steps
    with running(tiny_folder, {}, jobs=tmp_path) as server:
        ended = wait(server.client(), job)
        assert ended.status == "succeeded"
        steps = run.metrics()
        assert [each.step for each in steps] == [*range(1, steps[-1].steps + 1)]
        assert len(steps) > before
    with running(tiny_folder, {}, jobs=tmp_path) as server:
        names = {model.id for model in server.client().models.list()}
        deadline = time.monotonic() + 10
        while ended.fine_tuned_model not in names and time.monotonic() < deadline:
            names = {model.id for model in server.client().models.list()}
        assert ended.fine_tuned_model in names

"""The thread that answers, when something goes wrong in it."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest

from rankfold.models.answering.asked import Asked, Manner
from rankfold.models.answering.loop import Loop
from rankfold.models.answering.sampling import Sampling
from rankfold.serve.engine import FAILED, STOPPING, EndedError, Engine, FullError
from tiny_models import tiny


class Letters:
    added_tokens_decoder: dict = {}  # noqa: RUF012

    def decode(self, ids, **_):
        return "".join(chr(48 + token) for token in ids)


def question(tokens=4, **options):
    sampling = Sampling(max_new_tokens=tokens, temperature=0)
    return Asked([5, 6, 7], {}, "", Manner(Letters(), frozenset(), sampling), **options)


@pytest.fixture
def made():
    loops = []

    def make():
        loops.append(Loop(tiny("Llama"), 2, 1e9))
        return loops[-1]

    engine = Engine(nullcontext, make, most=4)
    engine.start()
    yield engine, loops
    if engine.is_alive:
        engine.stop()


def ask(engine, *asked):
    answers, done = [], threading.Semaphore(0)

    def end(answer):
        answers.append(answer)
        done.release()

    engine.ask([(each, end) for each in asked])
    for _ in asked:
        assert done.acquire(timeout=20)
    return answers


def test_a_fault_fails_those_who_wait_and_the_next_are_answered(made, caplog):
    engine, loops = made
    right = ask(engine, question())[0]
    loops[-1].turn = lambda: 1 / 0
    assert [answer.problem for answer in ask(engine, question(), question())] == [FAILED] * 2
    assert "ZeroDivisionError" in caplog.text
    assert ask(engine, question())[0] == right
    assert engine.pending == 0
    assert len(loops) == 2


def test_no_more_wait_than_may_and_all_are_told_at_the_end(made):
    engine, _ = made
    answers = []
    endless = question(tokens=60)
    engine.ask([(endless, answers.append)] * 4)
    with pytest.raises(FullError):
        engine.ask([(endless, answers.append)])
    late = engine.change(lambda loop: None, unused="nobody")
    assert late.result(20) is None
    engine.stop()
    assert len(answers) == 4
    assert {answer.problem for answer in answers} <= {"", STOPPING}
    with pytest.raises(FullError):
        engine.ask([(endless, answers.append)])


def test_a_change_waits_until_its_adapter_is_unused_and_tells_its_fault(made):
    engine, _ = made
    with pytest.raises(KeyError):
        engine.change(lambda loop: {}["x"]).result(20)
    cancelled = engine.change(lambda loop: pytest.fail("nobody waits"), unused="x")
    cancelled.cancel()
    assert engine.change(lambda loop: len(loop.rows)).result(20) == 0
    engine.stop()
    stuck = Engine(nullcontext, lambda: Loop(tiny("Llama"), 2, 1e9), most=4)
    left = stuck.change(lambda loop: None)
    stuck._is_stopping = True
    stuck.start()
    with pytest.raises(EndedError, match=STOPPING):
        left.result(20)

"""Answers that are written at the same time: the same as alone, and each may end, fail or be cancelled by itself."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from chatapp.engine import Sampling, batch
from chatapp.engine.rows import Rows
from tests.support.chats import answer, chat

pytestmark = pytest.mark.slow


def test_a_cancelled_answer_ends_at_once_and_leaves_the_engine_free(engine):
    cancel, seen = threading.Event(), []
    for chunk in engine.stream(chat("Count."), Sampling(temperature=2.0, seed=1, max_tokens=200), cancel):
        seen.append(chunk)
        cancel.set()
    assert seen[-1].finish_reason == "cancelled" and seen[-1].tokens <= seen[0].tokens + 1
    assert answer(engine, chat("Count."))[1][-1].finish_reason == "length"


def test_an_answer_that_waits_for_room_can_be_cancelled(engine, monkeypatch):
    monkeypatch.setattr(engine._batch._rows._decoder, "token_room", 300)
    permits, step = threading.Semaphore(0), Rows.step
    monkeypatch.setattr(Rows, "step", lambda *given: step(*given) if permits.acquire(timeout=60) else None)
    values, cancel = Sampling(max_tokens=200), threading.Event()
    with ThreadPoolExecutor() as threads:
        other = threads.submit(list, engine.stream(chat("Count."), values))
        while not engine._batch._writing:
            time.sleep(0.01)
        waiting = threads.submit(list, engine.stream(chat("Hello"), values, cancel))
        while engine._batch._added.empty():
            time.sleep(0.01)
        permits.release()  # the next round finds it
        while not engine._batch._waiting:
            time.sleep(0.01)
        assert len(engine._batch._writing) == 1
        cancel.set()
        permits.release(1000)
        assert [chunk.finish_reason for chunk in waiting.result()] == ["cancelled"]
        assert other.result()[-1].finish_reason in ("stop", "length")


def test_a_reader_that_goes_away_ends_its_answer(engine, monkeypatch):
    steps, step = [], Rows.step

    def counted(self, tokens):
        steps.append(len(tokens))
        time.sleep(0.01)  # the reader leaves before the answer is complete
        return step(self, tokens)

    monkeypatch.setattr(Rows, "step", counted)
    left = engine.stream(chat("Count."), Sampling(max_tokens=400, temperature=2.0, seed=1))
    next(left)
    left.close()
    while engine._batch.busy:
        time.sleep(0.01)
    assert len(steps) < 100 and not any(row.reserved for row in engine._batch._rows._rows)


def test_a_prompt_that_cannot_be_read_fails_alone(engine):
    """Through /v1/completions, a text may name a token that the model has no row for."""
    expected = answer(engine, chat("Hello"))[0]
    unknown = batch.Request([10**6] * 5, 8, Sampling(repetition_penalty=1), None, threading.Event())
    with ThreadPoolExecutor() as threads:
        beside = threads.submit(answer, engine, chat("Hello"))
        engine._batch.add(unknown)
        engine._worker.start(engine._batch)
        assert isinstance(unknown.events.get(timeout=60), batch.Begun)
        assert isinstance(unknown.events.get(timeout=60), Exception)
        assert beside.result()[0] == expected
    assert not any(row.reserved for row in engine._batch._rows._rows)


def test_an_answer_is_the_same_beside_others(engine):
    """Also to the last bit of its log probabilities, when others come, end and go away."""
    values = {"temperature": 1.0, "logprobs": 0, "max_tokens": 40}

    def ask(i: int) -> tuple[str, list[float]]:
        text, chunks = answer(
            engine, chat(f"Question {i}" + " egg" * i), **{**values, "seed": i, "max_tokens": 10 + 2 * i}
        )
        return text, [each.logprob for chunk in chunks for each in chunk.logprobs]

    numbers = range(40)  # more than there are rows
    alone = [ask(i) for i in numbers]
    for row in engine._batch._rows._rows:  # what was read in other steps has other last bits
        engine._batch._rows._forget(row)
    with ThreadPoolExecutor(len(numbers)) as threads:
        leaving = [engine.stream(chat(f"Leave {i}"), Sampling()) for i in range(3)]
        for stream in leaving:
            next(stream)
        together = threads.map(ask, numbers)
        for stream in leaving:
            stream.close()
        assert list(together) == alone


def test_an_answer_that_fails_fails_alone(engine, monkeypatch):
    expected, chosen = answer(engine, chat("Hello"), seed=5)[0], batch.choose

    def breaks(logits, seen, sampling, random):
        if sampling.seed == 7 and len(seen) == 3:
            raise RuntimeError("broken")
        return chosen(logits, seen, sampling, random)

    monkeypatch.setattr(batch, "choose", breaks)
    with ThreadPoolExecutor() as threads:
        answers = {seed: threads.submit(answer, engine, chat("Hello"), seed=seed) for seed in (5, 7, 8)}
        with pytest.raises(RuntimeError, match="broken"):
            answers[7].result()
        assert answers[5].result()[0] == answers[8].result()[0] == expected
    assert not any(row.reserved for row in engine._batch._rows._rows)


def test_a_failing_step_ends_all_answers_and_the_engine_goes_on(engine, monkeypatch):
    expected = answer(engine, chat("Hello"))[0]
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="the model failed: no memory"):
            answer(engine, chat("Hello"))
    assert answer(engine, chat("Hello"))[0] == expected


def test_a_long_prompt_can_be_cancelled_while_it_is_read(engine, monkeypatch):
    monkeypatch.setattr(engine._batch, "_step", 16)
    cancel, steps, read = threading.Event(), [], Rows.read

    def read_and_cancel(self, row, ids):
        steps.append(len(ids))
        if len(steps) == 2:
            cancel.set()
        return read(self, row, ids)

    monkeypatch.setattr(Rows, "read", read_and_cancel)
    chunks = list(engine.stream(chat("egg " * 150, system=None), Sampling(), cancel))
    assert chunks[-1].finish_reason == "cancelled" and chunks[-1].tokens == 0
    assert steps == [16, 16]

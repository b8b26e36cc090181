"""Work in threads: all of it is done, once, whoever does it; errors arrive; torch's number of threads comes back."""

import threading
import time
from contextlib import ExitStack

import pytest
import torch

from sv4d_ns.plugin import base_trainer
from sv4d_ns.utils import threads


@pytest.fixture(params=(1, 2, 5))
def count(request, monkeypatch):
    monkeypatch.setattr(threads, "workers", lambda: request.param)
    threads._pool.cache_clear()
    return request.param


def test_every_task_is_run_once(count):
    done = []
    threads.run_in_threads([lambda i=i: done.append(i) for i in range(50)])
    assert sorted(done) == list(range(50))


def test_no_task_is_no_work(count):
    threads.run_in_threads([])


def test_tasks_run_beside_each_other(count):
    meeting = threading.Barrier(min(count, 2), timeout=20)
    threads.run_in_threads([meeting.wait, meeting.wait])


def test_an_error_arrives_and_the_others_have_ended(count):
    ended = []

    def slow():
        time.sleep(0.05)
        ended.append(1)

    def bad():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        threads.run_in_threads([slow, bad, slow][:: 1 if count > 1 else -1])
    at_return = len(ended)
    time.sleep(0.15)
    assert len(ended) == at_return, "nothing goes on after the call"


def test_helpers_that_have_not_begun_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(threads, "workers", lambda: 2)
    threads._pool.cache_clear()
    release = threading.Event()
    busy = threads._pool(1).submit(release.wait, 20)  # another program's work, so to speak
    done = []
    threads.run_in_threads([lambda: done.append(1), lambda: done.append(2)])
    assert done == [1, 2] and not busy.done()
    release.set()


def test_the_number_of_torch_threads_comes_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads.torch_threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_useful_threads_is_one_or_all():
    before = torch.get_num_threads()
    assert threads.useful_threads() in (1, threads.workers())
    assert torch.get_num_threads() == before


def test_a_limit_holds_for_all_threads_and_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(threads, "_all_workers", lambda: 3)
    threads._pool.cache_clear()
    seen = []
    with threads.at_most(1), pytest.raises(KeyError), threads.at_most(5):
        other = threading.Thread(target=lambda: seen.append(threads.workers()))
        other.start()
        other.join()
        raise KeyError
    assert seen == [1] and threads.workers() == 3
    with threads.at_most(1):
        names = set()
        threads.run_in_threads([lambda: names.add(threading.current_thread().name)] * 4)
    assert names == {threading.current_thread().name}


def test_a_step_takes_the_threads_that_other_programs_leave(monkeypatch):
    answers = [1, 3]
    monkeypatch.setattr(base_trainer, "useful_threads", lambda: answers.pop(0))
    monkeypatch.setattr(threads, "_all_workers", lambda: 3)
    trainer = object.__new__(base_trainer.FieldTrainer)
    trainer._threads, trainer._useful = ExitStack(), None
    found = []
    for step in range(base_trainer.LOOK_EVERY - 1, base_trainer.LOOK_EVERY + 2):
        trainer.begin_step(step)
        found.append((threads.workers(), torch.get_num_threads()))
        trainer._threads.close()
    assert found == [(1, 1), (3, 1), (3, 1)] and threads.workers() == 3

"""The benchmark beside llama.cpp's server: how it counts, and its table in the documentation."""

import psutil
import pytest

from bench import cpu
from bench.machine import published
from stages.common.artifacts import read_json


@pytest.mark.slow
def test_each_token_has_its_time(address):
    server = cpu.Server("app", address, psutil.Process(), {"repetition_penalty": 1}, 1000, 9.0)
    (alone,) = server.ask([cpu.said("Count.")], 12)
    assert 6 < len(alone) <= 12 and alone == sorted(alone)  # a token may be a part of a character
    several = server.ask([cpu.said(f"Count {n}.") for n in range(4)], 12)
    assert len(several) == 4 and all(times == sorted(times) for times in several)


def test_only_an_event_with_text_counts():
    deltas = [{"role": "assistant", "content": None}, {"content": ""}, {}, {"content": "fox"}]
    assert [cpu.said_in({"choices": [{"delta": delta}]}) for delta in deltas] == ["", "", "", "fox"]
    assert cpu.said_in({"choices": []}) == ""


def test_the_table_has_medians():
    keys = {key for key, _, _ in cpu.ROWS.values()} - {"bytes", "perplexity", "limit", "memory"}
    server = cpu.Server("app", "", psutil.Process(), {}, 1000, 9.0)
    server.turns = [dict.fromkeys(keys, float(number)) for number in (1, 5, 2)]
    results = cpu.summary([server], 2e6)
    side = results["sides"]["app"]
    assert (side["limit"], side["speed_of_8"], results["turns"]) == (2000, 2.0, 3)
    said = cpu.table(results)
    assert all(f"| {label} |" in said for label in cpu.ROWS) and "| app |" in said


def test_a_text_that_was_not_read_before():
    assert cpu.words(5, (0, 50)) != cpu.words(5, (1, 50))
    assert len(cpu.words(50, 1).split()) == 50 and cpu.words(50, 1) == cpu.words(50, 1)


@pytest.mark.skipif(not cpu.RESULTS.is_file(), reason="the benchmark was not run")
def test_the_page_shows_the_recorded_results():
    assert published("bench.cpu") == cpu.table(read_json(cpu.RESULTS))

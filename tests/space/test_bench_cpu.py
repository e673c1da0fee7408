"""The benchmark beside others that users would take instead: how it counts, and its table in the documentation."""

import json
import math
import sys

import numpy as np
import psutil
import pytest
import torch

from bench import cpu, sides
from bench.machine import published
from stages.common.artifacts import read_json
from stages.common.chat import Chat, end_ids
from stages.common.generation import greedy_answers
from stages.common.model_files import load_tokenizer
from stages.common.models import load_model


@pytest.mark.slow
def test_each_token_has_its_time(address):
    clients = sides.Http(address, {"repetition_penalty": 1})
    (alone,) = clients.ask([cpu.said("Count.")], 12)
    assert 6 < len(alone) <= 12 and alone == sorted(alone)  # a token may be a part of a character
    several = clients.ask([cpu.said(f"Count {n}.") for n in range(4)], 12)
    assert len(several) == 4 and all(times == sorted(times) for times in several)


@pytest.mark.slow
def test_a_peer_in_its_own_process_answers_and_gives_logits(tiny_llama, tmp_path):
    tokenizer, model = load_tokenizer(tiny_llama), load_model(tiny_llama, torch.float32).eval()
    questions = [cpu.said("Count."), cpu.said("Tell me a longer story, please.")]
    prompts = [Chat.of(tokenizer).ids(question) for question in questions]
    answers = [greedy_answers(model, tokenizer, [prompt], 12, batch_size=1)[0] for prompt in prompts]
    with sides.peer(sys.executable, "transformers", tiny_llama, tokenizer) as piped:
        times = piped.ask(questions, 12)
        piped.process.stdin.write(json.dumps({"ids": prompts[0], "to": str(tmp_path / "logits.npy")}) + "\n")
        piped.process.stdin.flush()
        logits = np.load(json.loads(piped.process.stdout.readline()))
    ends = end_ids(tokenizer)
    assert [len(each) for each in times] == [sum(token not in ends for token in answer) for answer in answers]
    assert all(each == sorted(each) for each in times)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(torch.tensor(prompts[:1])).logits[0])


def test_only_an_event_with_text_counts_when_it_is_complete():
    deltas = [{"role": "assistant", "content": None}, {"content": ""}, {}, {"content": "fox"}, {"content": "\n\n"}]
    events = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    stream = "".join([*events, 'data: {"choices": []}\n\n', "data: [DONE]\n\n"]).encode()
    half = stream.index(b"fox")
    assert sides.times_of([(1.0, stream[:half]), (2.0, stream[half:])]) == [2.0, 2.0]
    assert sides.times_of([(float(at), stream[at : at + 1]) for at in range(len(stream))]) == [
        float(stream.index(text) + len(text)) for text in (events[3].encode()[:-1], events[4].encode()[:-1])
    ]


def test_the_table_has_medians():
    keys = {key for key, _, _ in cpu.ROWS.values()} - {"bytes", "perplexity", "limit", "memory"}
    side = sides.Side("app", sides.Http("", {}), psutil.Process(), 1000, 9.0)
    side.turns = [dict.fromkeys(keys, float(number)) for number in (1, 5, 2)]
    results = cpu.summary([side], 2e6)
    found = results["sides"]["app"]
    assert (found["limit"], found["speed_of_8"], results["turns"]) == (2000, 2.0, 3)
    said = cpu.table(results)
    assert all(f"| {label} |" in said for label in cpu.ROWS) and "| app |" in said


def test_an_answer_without_a_word_does_not_count():
    assert cpu.median([2.0, math.nan, 1.0]) == 1.5 and math.isnan(cpu.median([math.nan]))


def test_a_text_that_was_not_read_before():
    assert cpu.words(5, (0, 50)) != cpu.words(5, (1, 50))
    assert len(cpu.words(50, 1).split()) == 50 and cpu.words(50, 1) == cpu.words(50, 1)


@pytest.mark.skipif(not cpu.RESULTS.is_file(), reason="the benchmark was not run")
def test_the_page_shows_the_recorded_results():
    assert published("bench.cpu") == cpu.table(read_json(cpu.RESULTS))

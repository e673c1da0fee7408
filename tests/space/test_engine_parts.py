"""The engine's parts that need no exported model: prompts, sampling, the text of tokens."""

import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer

from chatapp.engine import Sampling
from chatapp.engine.batch import tokens_in_round, tokens_in_step
from chatapp.engine.conversation import check_messages, split_turns
from chatapp.engine.decoder import usable_cpus
from chatapp.engine.prompt import PromptBuilder
from chatapp.engine.sampling import choose, scores
from chatapp.engine.text_stream import TextStream
from tests.support.chats import chat


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([], "at least one"),
        ("Hello", "must be a list"),
        ([{"role": "user"}], r"messages\[0\] must have a role and a content"),
        ([{"role": "tool", "content": ""}], "must be system, user or assistant"),
        ([{"role": "user", "content": ["text"]}], "must be text"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "last message must be the user's"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message must be the user's"),
        ([{"role": "user", "content": " \n"}], "not empty"),
    ],
)
def test_what_is_no_conversation_is_refused_in_one_line(messages, problem):
    with pytest.raises(ValueError, match=problem) as error:
        check_messages(messages)
    assert "\n" not in str(error.value)


def test_turns_begin_with_the_user_after_an_answer():
    system, turns = split_turns(chat("a", "b", "c") + chat("d", system=None))
    assert [m["content"] for m in system] == ["You are a helpful assistant."]
    assert [[m["content"] for m in turn] for turn in turns] == [["a", "b"], ["c", "d"]]


def test_the_template_can_reach_nothing(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    template = tmp_path / "model/chat_template.jinja"
    for text in ("{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}"):
        template.write_text(text)
        with pytest.raises(ValueError, match="chat template refuses"):
            PromptBuilder(tmp_path / "model").ids([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "values, problem",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1, "top_p": 0}, "temperature.*; top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": "x"}, "seed"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_wrong_sampling_is_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        Sampling(**values)


def test_sampling_keeps_what_it_says():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))
    random = np.random.default_rng(0)

    def drawn(**values) -> dict[int, float]:
        draws = [choose(logits, np.array([], dtype=int), Sampling(**values), random) for _ in range(4000)]
        return {token: draws.count(token) / 4000 for token in sorted(set(draws))}

    everything = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert drawn(**everything) == pytest.approx({0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}, abs=0.03)
    assert drawn(**{**everything, "top_k": 2}) == pytest.approx({0: 2 / 3, 1: 1 / 3}, abs=0.03)
    assert set(drawn(**{**everything, "top_p": 0.7})) == {0, 1}
    assert set(drawn(**{**everything, "top_p": 0.01})) == {0}
    assert drawn(**{**everything, "temperature": 0.5})[0] == pytest.approx(0.25 / 0.345, abs=0.03)
    assert set(drawn(temperature=0)) == {0}


def test_a_repetition_penalty_lowers_what_was_said():
    logits = np.array([2.0, 1.9, -1.0], dtype=np.float32)
    greedy = Sampling(temperature=0, repetition_penalty=1.5)
    assert choose(logits, np.array([0, 0, 2]), greedy, np.random.default_rng(0)) == 1
    assert logits.tolist() == pytest.approx([2.0, 1.9, -1.0])  # the model's own memory is untouched


def test_a_repetition_penalty_does_not_count_the_prompt():
    """It has the token that ends an answer."""
    logits, random = np.array([2.0, 1.0, -1.0], dtype=np.float32), np.random.default_rng(0)
    greedy = Sampling(temperature=0, repetition_penalty=2)
    assert scores(logits, [0, 1, 2], greedy, random, prompt=1).tolist() == [2.0, 0.5, -2.0]


def test_without_a_repetition_penalty_there_is_none():
    logits, random = np.array([2.0, 1.9], dtype=np.float32), np.random.default_rng(0)
    for penalty in (None, 1):
        assert (
            scores(logits, [0], Sampling(temperature=0, repetition_penalty=penalty), random).tolist() == logits.tolist()
        )


def test_penalties_lower_what_the_answer_said_by_openais_formula():
    logits, random = np.array([2.0, 1.0, 0.0], dtype=np.float32), np.random.default_rng(0)

    def scored(seen, prompt=0, **values) -> list[float]:
        return scores(logits, seen, Sampling(temperature=0, **values), random, prompt).tolist()

    # Token 0 was said twice, token 1 once.
    assert scored([0, 1, 0], presence_penalty=0.5) == [1.5, 0.5, 0.0]
    assert scored([0, 1, 0], frequency_penalty=0.5) == [1.0, 0.5, 0.0]
    assert scored([0, 1, 0], presence_penalty=-1, frequency_penalty=2) == [-1.0, 0.0, 0.0]
    # What stands in the prompt does not count.
    assert scored([0, 1, 0], prompt=2, frequency_penalty=0.5) == [1.5, 1.0, 0.0]
    assert scored([0, 1, 0], prompt=3, frequency_penalty=2) == [2.0, 1.0, 0.0]
    greedy = Sampling(temperature=0, frequency_penalty=1.5)
    assert [choose(logits, seen, greedy, random, prompt=1) for seen in ([0], [0, 0])] == [0, 1]


def test_the_best_score_is_a_sample_also_where_tokens_are_forbidden():
    logits, random = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32)), np.random.default_rng(0)

    def drawn(forbidden, **values) -> dict[int, float]:
        sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, **values})
        draws = []
        for _ in range(4000):
            scored = scores(logits, [], sampling, random)
            scored[forbidden] = np.finfo(np.float32).min
            draws.append(int(scored.argmax()))
        return {token: draws.count(token) / 4000 for token in sorted(set(draws))}

    assert drawn([]) == pytest.approx({0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}, abs=0.03)
    assert drawn([0]) == pytest.approx({1: 0.5, 2: 0.3, 3: 0.2}, abs=0.03)
    assert drawn([], top_k=2) == pytest.approx({0: 2 / 3, 1: 1 / 3}, abs=0.03)
    # All that top-k keeps is forbidden: the most likely other token.
    assert drawn([0, 1], top_k=2) == {2: 1.0}


def test_text_comes_in_complete_characters(tiny_llama):
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    text = "  Größe: 日本語 🦜🏽, naïve…\n\n- a\n- b \n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids] + [stream.finish()]
    assert "".join(pieces) == text.strip()
    assert "\ufffd" not in "".join(pieces) and len([piece for piece in pieces if piece]) > 10
    # Cut inside a character, it is left out.
    parrot = tokenizer.encode("ok 🦜", add_special_tokens=False).ids[:-1]
    stream = TextStream(tokenizer)
    assert "".join([stream.add(token) for token in parrot] + [stream.finish()]) == "ok"


def test_there_is_a_cpu_to_use():
    assert usable_cpus() >= 1


def test_a_large_model_reads_in_small_steps():
    sizes = (160_000_000, 1_000_000_000, 2_290_000_000)
    assert [tokens_in_step(size) for size in sizes] == [64, 32, 16]
    assert [tokens_in_round(size) for size in sizes] == [200, 32, 16]

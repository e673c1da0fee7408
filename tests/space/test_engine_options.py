"""What a request may ask of the engine: log probabilities, penalties, a JSON object, a plain text that goes on."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatapp.engine import CannotConstrain, Engine, Sampling
from chatapp.engine.json_constraint import JsonConstraint
from tests.support.chats import answer, chat

pytestmark = pytest.mark.slow


def test_logprobs_are_those_of_transformers(engine, model, request):
    source = request.getfixturevalue(f"tiny_{'llama' if '<|im_end|>' == model.tokenizer.eos_token else 'phi'}")
    reference = AutoModelForCausalLM.from_pretrained(source)
    messages = chat("What is the capital of France?")
    _, chunks = answer(engine, messages, max_tokens=8, logprobs=3)
    found = [logprob for chunk in chunks for logprob in chunk.logprobs]
    ids = engine.prompt_ids(messages)
    for each in found:
        expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1].double(), -1)
        best = expected.topk(3)
        assert each.logprob == pytest.approx(best.values[0].item(), abs=0.01)
        assert [top.logprob for top in each.top] == pytest.approx(best.values.tolist(), abs=0.01)
        assert each.token == each.top[0].token == engine._batch._bytes.of(int(best.indices[0]))
        ids = [*ids, int(best.indices[0])]
    assert len(found) == 8
    assert not any(chunk.logprobs for chunk in answer(engine, messages)[1])


def test_a_frequency_penalty_ends_repetition(engine):
    """The tiny models repeat themselves."""

    def repeated(**sampling) -> int:
        _, chunks = answer(engine, chat("Count."), max_tokens=40, logprobs=0, **sampling)
        said = [each.token for chunk in chunks for each in chunk.logprobs]
        return len(said) - len(set(said))

    assert repeated(frequency_penalty=2, presence_penalty=2) < repeated()


def test_a_json_object_is_one_at_every_temperature(engine, model, monkeypatch):
    # Untrained models hardly ever close a string: make what closes one likely.
    closing = [model.tokenizer.convert_tokens_to_ids(text) for text in ('"', "}")]
    choose = JsonConstraint.choose

    def closes(self, scored):
        scored = scored.copy()
        scored[closing] = scored.max() + 1
        return choose(self, scored)

    monkeypatch.setattr(JsonConstraint, "choose", closes)
    complete = 0
    for seed, temperature in enumerate((0, 0.5, 1, 2, 5, 5)):
        values = {"json_object": True, "temperature": temperature, "seed": seed, "max_tokens": 150}
        text, chunks = answer(engine, chat("Give JSON."), **values)
        assert text.startswith("{")
        if chunks[-1].finish_reason == "stop":  # otherwise cut
            assert isinstance(json.loads(text), dict)
            complete += 1
        assert answer(engine, chat("Give JSON."), **values)[0] == text
    assert complete >= 2
    assert not answer(engine, chat("Give JSON."))[0].startswith("{")  # the engine answers as before


def test_white_space_in_json_is_bounded(engine, model, monkeypatch):
    """Otherwise a model that likes white space would write nothing else."""
    spaces = [model.tokenizer.convert_tokens_to_ids(text) for text in ("Ġ", "Ċ")]
    closing = model.tokenizer.convert_tokens_to_ids("}")
    choose = JsonConstraint.choose

    def likes_space(self, scored):
        scored = scored.copy()
        scored[closing], scored[spaces] = scored.max() + 1, scored.max() + 2
        return choose(self, scored)

    monkeypatch.setattr(JsonConstraint, "choose", likes_space)
    text, chunks = answer(engine, chat("Give JSON."), json_object=True, max_tokens=60)
    assert json.loads(text) == {} and chunks[-1].finish_reason == "stop" and len(text) == 18


def test_a_model_that_cannot_be_constrained_says_so(model, tmp_path):
    folder = shutil.copytree(model.folder, tmp_path / "model")
    engine = Engine(folder, threads=1)
    (folder / "tokenizer.json").write_text("{}")  # llguidance reads it only now
    with pytest.raises(CannotConstrain, match="this model's answers cannot be constrained to JSON") as raised:
        answer(engine, chat("Give JSON."), json_object=True)
    assert "\n" not in str(raised.value)
    assert answer(engine, chat("Hello"))[1][-1].finish_reason == "length"


def test_a_plain_text_goes_on_without_a_template(engine, model, request):
    source = request.getfixturevalue(f"tiny_{'llama' if '<|im_end|>' == model.tokenizer.eos_token else 'phi'}")
    reference = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor([model.tokenizer("The capital of France is").input_ids])
    end = model.tokenizer.eos_token_id
    expected = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)[0]
    chunks = list(engine.complete("The capital of France is", Sampling(temperature=0, max_tokens=12)))
    text = "".join(chunk.text for chunk in chunks)
    assert text == model.tokenizer.decode(expected[ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")
    assert chunks[-1].prompt_tokens == ids.shape[1]
    for prompt, problem in (("", "at least one token"), ("egg " * 600, "the prompt is too long: it has")):
        with pytest.raises(ValueError, match=problem):
            engine.complete(prompt)

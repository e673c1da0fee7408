"""One chat template in tokenize, merge, export and the app: the same ids, and the same tokens that end answers."""

import json
import re

import pytest
import torch
from transformers import AutoTokenizer

from chatapp.engine.prompt import PromptBuilder
from stages.common.chat import Chat, ChatError, check_same_ids, end_ids, plain_template, rendered_by
from stages.common.chat.probes import probes
from stages.common.errors import StageError
from stages.common.generation import greedy_answers
from stages.common.models import load_model
from stages.evaluate import ended
from stages.export import set_tokenizer
from stages.merge import save_tokenizer
from stages.merge import set_special_tokens as set_models_tokens
from stages.tokenize import load_template, set_special_tokens
from tests.support.templates import LOOP, PROMPT, SMALL, TURN, talk, tokenizer_for

# The same ids everywhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_tokenize_merge_export_and_the_app_give_the_same_ids(name, tmp_path):
    template = SMALL[name]
    tokenizer = tokenizer_for(template)
    set_special_tokens(tokenizer, template, len(tokenizer))
    training = Chat.of(tokenizer)
    check_same_ids(training, rendered_by(tokenizer), "transformers, with the marks")
    for folder in ("merged", "onnx"):
        (tmp_path / folder).mkdir()
    save_tokenizer(tokenizer, tmp_path / "merged")  # checks, too
    (tmp_path / "onnx/genai_config.json").write_text(json.dumps({"model": {"eos_token_id": 7}}))
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    set_tokenizer(tmp_path / "onnx", merged, tmp_path / "merged")  # checks, too
    exported, app = Chat.of_folder(tmp_path / "onnx"), PromptBuilder(tmp_path / "onnx")
    compared = 0
    for messages in [*probes(), talk("<|im_end|>", " A<|stop|>", "\tQ")]:
        for prefix in (messages[:n] for n in range(1, len(messages) + 1)):
            try:
                expected = training.ids(prefix)
            except ChatError:
                continue
            compared += 1
            assert Chat.of(merged).ids(prefix) == exported.ids(prefix) == app.ids(prefix) == expected
    assert compared > 10


def without_marks(template: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def test_marks_that_are_only_cut_out_would_change_white_space_and_merge_refuses_that(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.merge.plain_template", without_marks)
    with pytest.raises(StageError, match="the merged model's tokenizer gives other tokens than training saw") as error:
        save_tokenizer(tokenizer_for(SMALL["marks_on_lines"]), tmp_path)
    assert "\n" not in str(error.value)


def test_a_variable_set_between_the_marks_stays_there():
    assert "{% with %}" in plain_template(SMALL["sets_inside_marks"])
    assert "{%- if true -%}" in plain_template(SMALL["marks_with_signs"])


def test_an_exported_template_that_differs_is_refused(tmp_path):
    tokenizer = tokenizer_for(LOOP + TURN + PROMPT)
    save_tokenizer(tokenizer, tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ m.content }}", "{{ m.content | trim }}"))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/genai_config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(StageError, match="gives other tokens than training saw"):
        set_tokenizer(tmp_path / "onnx", tokenizer, tmp_path)


# Where answers end -------------------------------------------------------------------------------------------------


def test_generation_stops_at_every_token_that_closes_an_answer(tiny_llama, tmp_path):
    template = SMALL["an_end_for_each_position"].replace("<|stop|>", "<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert set_special_tokens(tokenizer, template, len(tokenizer)) == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|im_start|>"  # no end is the padding
    ends = end_ids(tokenizer)
    assert ends == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert ended([5, ends[0]], ends) and ended([ends[1]], ends) and not ended([5], ends) and not ended([], ends)

    model = load_model(tiny_llama, torch.float32).eval()
    set_models_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ends
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/genai_config.json").write_text(json.dumps({"model": {"eos_token_id": 7}}))
    set_tokenizer(tmp_path / "onnx", tokenizer, tmp_path)
    assert json.loads((tmp_path / "onnx/genai_config.json").read_text())["model"]["eos_token_id"] == ends


@pytest.mark.parametrize("which", [0, 1])
def test_a_greedy_answer_ends_at_any_of_them(tiny_llama, which, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = load_model(tiny_llama, torch.float32).eval()
    (free,) = greedy_answers(model, tokenizer, [[40, 41, 42]], 8, 1)
    ends = [599, 599]
    ends[which] = free[2]  # its third token is an end now
    monkeypatch.setattr("stages.common.generation.end_ids", lambda tokenizer: ends)
    (short,) = greedy_answers(model, tokenizer, [[40, 41, 42]], 8, 1)
    assert short == free[: free.index(free[2]) + 1] and len(short) < len(free)


def test_one_end_token_is_a_number_as_before(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    set_special_tokens(tokenizer, load_template("chatml", tokenizer), len(tokenizer))
    model = load_model(tiny_llama, torch.float32)
    set_models_tokens(model, tokenizer)
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )

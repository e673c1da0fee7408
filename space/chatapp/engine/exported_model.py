"""Load an exported model: the files that the export stage wrote."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatapp.engine.decoder import Decoder
from chatapp.engine.prompt import PromptBuilder

FILES = (
    "model.onnx",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "card.json",
)
# A CPU needs minutes to read a longer context, and a Space has no memory for it.
MAX_CONTEXT = 4096


@dataclass(frozen=True)
class ExportedModel:
    card: dict[str, Any]  # what the export stage wrote about the model
    prompt: PromptBuilder
    decoder: Decoder
    context_length: int  # tokens that this app uses: the model's context, at most MAX_CONTEXT
    end_ids: frozenset[int]  # each of these tokens ends an answer
    size: int  # bytes of the weights
    repetition_penalty: float  # with which the export stage measured its answers


def load_exported(folder: Path, threads: int | None = None) -> ExportedModel:
    """Load the model in `folder`; it computes on `threads` CPUs (None: all usable ones).

    Raises FileNotFoundError when a file is missing, ValueError when a file is damaged.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no exported model: {name} is missing")
    try:
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        ends = settings["eos_token_id"]
        context_length = min(settings["context_length"], MAX_CONTEXT)
        return ExportedModel(
            card=card,
            prompt=PromptBuilder(folder),
            decoder=Decoder(folder, threads, context_length),
            context_length=context_length,
            end_ids=frozenset(ends if isinstance(ends, list) else [ends]),
            size=sum(path.stat().st_size for path in folder.glob("model.onnx*")),
            repetition_penalty=float(card.get("export", {}).get("repetition_penalty", 1.0)),
        )
    except Exception as error:  # onnxruntime and tokenizers raise bare Exceptions
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{folder} holds a damaged model ({reason})") from error

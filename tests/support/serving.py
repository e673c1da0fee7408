"""The chat app for tests: tiny exported models, and the app on a free port of loopback."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.chat_server import answers, wait_until
from tests.support.models import save_llama
from tests.support.project import ROOT


def export_tiny(folder: Path) -> Path:
    """Two exported tiny Llamas, `tuned` and `base`, in `folder`. Left to themselves they never end an answer."""
    import torch
    from onnxruntime_genai.models.builder import create_model, parse_extra_options
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.merge import plain_template

    for seed, name in enumerate(("tuned", "base")):
        source = save_llama(folder / "source" / name)
        changes = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(source, **changes))
        torch.manual_seed(seed)
        with torch.no_grad():
            model.lm_head.weight.normal_()
            model.lm_head.weight[:3] = 0  # special tokens are never among the likeliest
        model.save_pretrained(source)
        template = (ROOT / "stages/templates/chatml.jinja").read_text(encoding="utf-8")
        (source / "chat_template.jinja").write_text(plain_template(template), encoding="utf-8")
        task = ("", str(source), str(folder / name), "int4", "cpu", str(folder / "cache"))
        create_model(*task, **parse_extra_options(*task, []))
        card = {
            "name": name,
            "base_model": {"source": "file:data/local/tiny", "revision": None, "license": None},
            "datasets": [{"source": "ada/trees", "revision": "9" * 40, "license": "apache-2.0"}]
            if name == "tuned"
            else [],
            "training": {"params": {"lora_r": 16}} if name == "tuned" else None,
            "system_prompt": "You are a helpful assistant.",
            "export": {"export_precision": "int4"},
            "quality": {"perplexity": 395.0},
        }
        (folder / name / "card.json").write_text(json.dumps(card))
    return folder


class Paced:
    """An engine that takes its time: `seconds` more for each piece of an answer."""

    def __init__(self, engine, seconds: float) -> None:
        self._engine = engine
        self.seconds = seconds
        self.card = engine.card
        self.context_length = engine.context_length

    def stream(self, *args) -> Iterator:
        for chunk in self._engine.stream(*args):
            time.sleep(self.seconds)
            yield chunk


@contextmanager
def served(engines, queue, send_buffer: int | None = None, **settings) -> Iterator[str]:
    """The app of these engines in this process, in a thread of its own; gives its address.

    `settings` are uvicorn's; `send_buffer`: what the system holds for a client that does not read.
    """
    import uvicorn
    from app import build, listen

    listener = listen("127.0.0.1", 0)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    settings = {"log_level": "warning", "timeout_graceful_shutdown": 1, **settings}
    server = uvicorn.Server(uvicorn.Config(build(engines, queue, "a1b2c3"), **settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: answers(address))
        yield address
    finally:
        server.should_exit = True
        thread.join(30)

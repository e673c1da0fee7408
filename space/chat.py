"""Chat with an exported model in the terminal. Run: `make chat MODEL=tuned`; alone: `python chat.py --model FOLDER`.

Answers stream, and Ctrl-C stops one. Commands: /reset begins a new conversation, /system TEXT begins one with that
system message, /help lists the commands, /quit (or Ctrl-D) ends the chat.
"""

import argparse
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from chatapp.engine import Chunk, Engine, Sampling
from chatapp.page.model_card import subtitle, title
from chatapp.word_wrap import WordWrap

HELP = "/reset begins a new conversation, /system TEXT sets the system message, /quit ends. Ctrl-C stops an answer."


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chat.py", description=(__doc__ or "").partition("\n")[0])
    folder = Path(__file__).parent / "model/tuned"
    parser.add_argument("--model", type=Path, default=folder, help="folder of one exported model")
    parser.add_argument("--max-tokens", type=int, default=Sampling.max_tokens, help="max tokens of an answer")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=Sampling.top_p)
    parser.add_argument("--seed", type=int, help="repeat the same answers")
    return parser.parse_args(arguments)


def summary(chunk: Chunk, seconds: float) -> str:
    """The line below an answer."""
    notes = [f"{chunk.tokens} tokens, {chunk.tokens / max(seconds, 1e-9):.0f} a second"]
    if chunk.reused_tokens:
        notes.append(f"{chunk.reused_tokens} of {chunk.prompt_tokens} prompt tokens from the cache")
    if chunk.dropped_turns:
        notes.append(f"the oldest {chunk.dropped_turns} turn(s) did not fit and were not read")
    if chunk.finish_reason == "length":
        notes.append("cut at --max-tokens or the end of the context")
    if chunk.finish_reason == "cancelled":
        notes.append("stopped")
    return f"[{'; '.join(notes)}]"


def print_answer(engine: Engine, messages: list[dict[str, str]], sampling: Sampling) -> str:
    """Print the answer piece by piece, then its summary; return the answer."""
    cancel, answer, began = threading.Event(), "", 0.0
    # A file or a pipe gets the text as it is.
    wrap = WordWrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
    chunks = engine.stream(messages, sampling, cancel)
    # Ctrl-C only asks the engine to stop, so that the answer ends at a complete token.
    before = signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        for chunk in chunks:
            began = began or time.monotonic()
            answer += chunk.text
            print(wrap.add(chunk.text) if wrap else chunk.text, end="", flush=True)
            if chunk.finish_reason:
                print(f"{wrap.finish() if wrap else ''}\n{summary(chunk, time.monotonic() - began)}\n", flush=True)
    finally:
        signal.signal(signal.SIGINT, before)
    return answer


def converse(engine: Engine, sampling: Sampling, system: str) -> None:
    """Read questions from standard input until it ends."""
    history: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends)")
            continue
        except EOFError:
            print()
            return
        command, _, rest = question.partition(" ")
        match command:
            case "":
                continue
            case "/quit":
                return
            case "/reset":
                history = []
                print("A new conversation.")
            case "/system":
                history, system = [], rest
                print(f"A new conversation, {'with this' if rest else 'without a'} system message.")
            case _ if command.startswith("/"):
                print(HELP)
            case _:
                asked = [*history, {"role": "user", "content": question}]
                first = [{"role": "system", "content": system}] if system else []
                try:
                    answer = print_answer(engine, first + asked, sampling)
                except ValueError as error:
                    print(f"error: {error}")
                    continue
                history = [*asked, {"role": "assistant", "content": answer}]


def main() -> None:
    chosen = options()
    try:
        sampling = Sampling(chosen.max_tokens, chosen.temperature, chosen.top_p, seed=chosen.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        engine = Engine(chosen.model)
    except ValueError as error:
        sys.exit(f"error: {error}. Delete it, then run `make all` to export it again.")
    except FileNotFoundError as error:
        others = sorted(path.parent.name for path in chosen.model.parent.glob("*/card.json"))
        if others and not chosen.model.is_dir():
            sys.exit(f"error: {chosen.model} is no exported model, there are: {', '.join(others)}. Use one of them.")
        sys.exit(f"error: {error}. Run `make all` to export one.")
    print(f"{title(engine.card)}\n{subtitle(engine.card)}\n{HELP}\n")
    converse(engine, sampling, engine.card.get("system_prompt") or "")


if __name__ == "__main__":
    main()

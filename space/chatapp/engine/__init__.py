"""The engine: answers of one exported model, as streams. The page, the API, the terminal and benchmarks use it.

engine = Engine(Path("models/onnx/tuned"))
for chunk in engine.stream([{"role": "user", "content": "Hello!"}]):
    print(chunk.text, end="", flush=True)
"""

from chatapp.engine.decoder import MAX_ROWS
from chatapp.engine.engine import Chunk, Engine, load_engines
from chatapp.engine.json_constraint import CannotConstrain
from chatapp.engine.sampling import Sampling
from chatapp.engine.token_logprobs import TokenLogprob

__all__ = ["MAX_ROWS", "CannotConstrain", "Chunk", "Engine", "Sampling", "TokenLogprob", "load_engines"]

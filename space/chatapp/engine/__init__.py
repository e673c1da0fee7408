"""The engine: answers of one exported model, as streams. The page, the API, the terminal and benchmarks use it.

engine = Engine(Path("models/onnx/tuned"))
for chunk in engine.stream([{"role": "user", "content": "Hello!"}]):
    print(chunk.text, end="", flush=True)
"""

from chatapp.engine.engine import Chunk, Engine, load_engines
from chatapp.engine.sampling import Sampling

__all__ = ["Chunk", "Engine", "Sampling", "load_engines"]

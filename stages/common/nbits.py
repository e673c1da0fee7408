"""Put rounded weights into an exported model, in place of the builder's.

onnxruntime's MatMulNBits: 4-bit integers two to a byte, the first one in the lower half; one scale and one zero point a
block (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from stages.common.gptq import Rounded

MODEL = "model.onnx"
PARTS = 3  # inputs of a node after the activations: weight, scales and zero points, if it has those


@dataclass(frozen=True)
class Packed:
    """A product's rounded weight as the graph stores it."""

    weight: np.ndarray  # uint8, (rows, blocks, bytes of a block)
    scales: np.ndarray  # float32, (rows, blocks)
    zeros: np.ndarray | None  # uint8, (rows, bytes of a row's zero points); None where all are in the middle


def pack(rounded: Rounded, symmetric: bool) -> Packed:
    """`symmetric`: without zero points; the graph takes the middle."""
    rows, blocks = rounded.scales.shape
    return Packed(
        _halves(rounded.integers).reshape(rows, blocks, -1).numpy(),
        rounded.scales.contiguous().numpy(),
        None if symmetric else _halves(torch.nn.functional.pad(rounded.zeros, (0, blocks % 2))).numpy(),
    )


def _halves(integers: torch.Tensor) -> torch.Tensor:
    return integers[:, 0::2] | integers[:, 1::2] << 4


def put_weights(folder: Path, packed: dict[str, Packed]) -> None:
    """Overwrite the weights of the 4-bit nodes named in `packed` in an exported model.

    Raises ValueError where the model has no such node, or one of another shape.
    """
    model = onnx.load(folder / MODEL, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name.removesuffix("_Q4"): node for node in model.graph.node if node.op_type == "MatMulNBits"}
    for name, weight in packed.items():
        if name not in nodes:
            raise ValueError(f"{folder / MODEL} has no 4-bit node {name}")
        arrays = [array for array in (weight.weight, weight.scales, weight.zeros) if array is not None]
        inputs = nodes[name].input[1 : 1 + PARTS]
        for tensor, array in zip([stored[n] for n in inputs if n in stored], arrays, strict=True):
            if list(tensor.dims) != list(array.shape):
                raise ValueError(f"{tensor.name} has shape {list(tensor.dims)}, not {list(array.shape)}")
            _overwrite(folder, tensor, array.tobytes())
    onnx.save(model, folder / MODEL)


def _overwrite(folder: Path, tensor: onnx.TensorProto, data: bytes) -> None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        tensor.raw_data = data
        return
    place = {entry.key: entry.value for entry in tensor.external_data}
    if int(place["length"]) != len(data):
        raise ValueError(f"{tensor.name} has {place['length']} bytes, not {len(data)}")
    with open(folder / place["location"], "r+b") as file:
        file.seek(int(place.get("offset", 0)))
        file.write(data)

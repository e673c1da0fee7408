"""Put rounded weights into an exported model, in place of the builder's, and store its scales in 16 bits.

onnxruntime's MatMulNBits: 4-bit integers two to a byte, the first one in the lower half; one scale and one zero point a
block (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from stages.common.gptq import Grid, Rounded

MODEL, DATA = "model.onnx", "model.onnx.data"
MULTIPLIES = "MatMulNBits"  # its inputs: activations, weight, scales and, if it has them, zero points
LOOKS_UP = "GatherBlockQuantized"  # of an embedding: weight, ids, scales and, if it has them, zero points
SCALES, ZEROS = 2, 3  # the place of these inputs
ROTARY = ("cos_cache", "sin_cache")


@dataclass(frozen=True)
class Packed:
    """A product's rounded weight as the graph stores it."""

    grid: Grid
    weight: np.ndarray  # uint8, (rows, blocks, bytes of a block)
    scales: np.ndarray  # float16, (rows, blocks)
    zeros: np.ndarray | None  # uint8, (rows, bytes of a row's zero points); None where all are in the middle


def pack(rounded: Rounded, grid: Grid) -> Packed:
    rows, blocks = rounded.scales.shape
    weight, zeros = rounded.integers, rounded.zeros
    if grid.bits == 4:
        weight, zeros = _halves(weight), _halves(torch.nn.functional.pad(zeros, (0, blocks % 2)))
    return Packed(
        grid,
        weight.reshape(rows, blocks, -1).numpy(),
        rounded.scales.half().contiguous().numpy(),
        None if grid.symmetric else zeros.contiguous().numpy(),
    )


def _halves(integers: torch.Tensor) -> torch.Tensor:
    return integers[:, 0::2] | integers[:, 1::2] << 4


def put_weights(folder: Path, packed: Mapping[str, Packed]) -> None:
    """Give the nodes named in `packed` these weights, and store all scales and rotary positions in 16 bits.

    An embedding that shares a node's weights gets them, too. Raises ValueError where the model has no such node, or one
    of another shape or other bits.
    """
    model = onnx.load(folder / MODEL)
    nodes = {node.name.rpartition("_Q")[0]: node for node in model.graph.node if node.op_type == MULTIPLIES}
    for name, weight in packed.items():
        if name not in nodes or _attribute(nodes[name], "bits").i != weight.grid.bits:
            raise ValueError(f"{folder / MODEL} has no {weight.grid.bits}-bit node {name}")
        _put(model.graph, nodes[name], weight)
    _halve(model.graph)
    (folder / DATA).unlink()
    onnx.save(model, folder / MODEL, save_as_external_data=True, location=DATA)


def _put(graph: GraphProto, node: NodeProto, weight: Packed) -> None:
    rows, columns = len(weight.weight), _attribute(node, "K").i
    if (rows, -(-columns // weight.grid.block)) != (_attribute(node, "N").i, weight.scales.shape[1]):
        raise ValueError(f"{node.name} has no room for a weight of shape {weight.weight.shape}")
    _, name, scales, *zeros = node.input
    _store(graph, name, weight.weight)
    _store(graph, scales, weight.scales.astype(np.float32))
    if weight.zeros is not None:
        _store(graph, zeros[0], weight.zeros)
    for reader in _readers(graph, scales):
        _attribute(reader, "block_size").i = weight.grid.block
        if weight.zeros is None and len(reader.input) > ZEROS:
            del reader.input[ZEROS]
    if weight.zeros is None and zeros:
        graph.initializer.remove(_stored(graph, zeros[0]))


def _halve(graph: GraphProto) -> None:
    """Store scales and rotary positions in float16. onnxruntime converts them to float32 once, when it loads them."""
    names = {node.input[SCALES]: None for node in graph.node if node.op_type in (MULTIPLIES, LOOKS_UP)}
    names |= {tensor.name: None for tensor in graph.initializer if tensor.name in ROTARY}
    for name in names:
        half = f"{name}_half"
        tensor = _stored(graph, name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), half))
        graph.node.insert(0, helper.make_node("Cast", [half], [name], name=f"{name}_cast", to=TensorProto.FLOAT))
    for value in [value for value in graph.value_info if value.name in names]:
        graph.value_info.remove(value)  # it says the shape of the builder's blocks


def _store(graph: GraphProto, name: str, array: np.ndarray) -> None:
    _stored(graph, name).CopyFrom(numpy_helper.from_array(array, name))


def _stored(graph: GraphProto, name: str) -> TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def _readers(graph: GraphProto, scales: str) -> list[NodeProto]:
    return [node for node in graph.node if node.op_type in (MULTIPLIES, LOOKS_UP) and node.input[SCALES] == scales]


def _attribute(node: NodeProto, name: str) -> AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)

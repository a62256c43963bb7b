"""The MatMul-free model as an ONNX graph: one function a building block.

The maths is that of the model in float32, a layer's wiring that of `model/layer.py`. One
graph reads a prompt's chunk and decodes a token: time is a dynamic axis.

A BitLinear's product comes in three forms (`Product`):

  exact    int8 activations, one scale a token, as in training; the sums of the training path,
           every bit of them. The product is `MatMulNBits` with two bits a weight, whose kernels
           quantise their input again, by blocks: to int8 of scale (largest magnitude) / 127. Each
           block gets one column more, which holds 127 and has the weight zero. So the scale is
           exactly 1, the second quantisation changes nothing, and the float32 results are the
           integer sums (below 2^24).
  integer  the same sums by `MatMulInteger`, from the same file: for runtimes without two-bit
           kernels, such as WebAssembly. Activations are shifted to uint8, for which those have
           kernels; a pair of products stays below 2^15 because weights are ternary.
  fast     `MatMulNBits` on the normalised activations themselves, which the runtime quantises to
           int8 by blocks. Finer than one scale a token, but not what the model was trained with.

Shapes: B rows, T time steps, D hidden channels, E state channels, L layers, V vocabulary,
N outputs and K inputs of a matrix, b columns of a block, C blocks.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mmfree_jax.model import layer
from mmfree_jax.model.layer import GLUWeights, MLGRUWeights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.norm_quant.api import MIN_ABSMAX

Product = Literal["exact", "integer", "fast"]

# Kernels for two bits exist for blocks of 32, 64 and 128 columns.
BLOCK = 128
# Versions of the operators and of the file format: the first with RMSNormalization, and for
# `integer` the first with two-bit numbers.
OPSETS = {"exact": 23, "fast": 23, "integer": 25}
IR_VERSIONS = {"exact": 11, "fast": 11, "integer": 13}
# What stands for trit 0; -1 and +1 are the codes beside it. The operator's default zero point.
ZERO_CODE = 2
MICROSOFT = "com.microsoft"


@dataclass
class Graph:
    """Nodes and constants as they are added; a value is the name of its tensor.

    Attributes:
      config: of the model.
      product: of the BitLinears.
      padded: whether the stored codes have a column of weight zero in each block.
      nodes, constants: so far.
    """

    config: ModelConfig
    product: Product
    padded: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def add(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node of one output; returns its name."""
        return self.add_many(op, *inputs, outputs=1, domain=domain, **attributes)[0]

    def add_many(
        self, op: str, *inputs: str, outputs: int, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Adds a node; returns its outputs' names."""
        name = f"{op}_{len(self.nodes)}"
        names = [name, *(f"{name}_{i}" for i in range(1, outputs))]
        node = helper.make_node(op, list(inputs), names, name, domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small constant, kept once."""
        array = np.asarray(value, dtype)
        name = f"{array.dtype.name}{list(array.shape) or ''}{array.tolist()}".replace(" ", "")
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name


def rms_norm(g: Graph, x: str, scale: str, *, eps: float) -> str:
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis."""
    return g.add("RMSNormalization", x, scale, axis=-1, epsilon=eps)


def silu(g: Graph, x: str) -> str:
    """x sigmoid(x)."""
    if g.product == "fast":
        return g.add("Mul", x, g.add("Sigmoid", x))
    # Written out as XLA computes it: the runtime's own Sigmoid is an approximation.
    return g.add("Mul", x, inverse_of_one_plus(g, g.add("Exp", g.add("Neg", x))))


def inverse_of_one_plus(g: Graph, x: str) -> str:
    """1 / (1 + x)."""
    return g.add("Reciprocal", g.add("Add", x, g.constant(1)))


def closed_gate(g: Graph, f: str) -> str:
    """sigmoid(-f), of full precision where it is small."""
    if g.product == "fast":
        return g.add("Sigmoid", g.add("Neg", f))
    small = g.add("Exp", g.add("Neg", g.add("Abs", f)))
    larger = inverse_of_one_plus(g, small)
    positive = g.add("GreaterOrEqual", f, g.constant(0))
    return g.add("Where", positive, g.add("Mul", small, larger), larger)


def quantize(g: Graph, x: str) -> tuple[str, str]:
    """Each token to whole numbers of magnitude 127 at most: float32 of x's shape, and absmax."""
    absmax = g.add("ReduceMax", g.add("Abs", x), g.constant([-1], np.int64))
    absmax = g.add("Max", absmax, g.constant(MIN_ABSMAX))
    factor = g.add("Div", g.constant(127), absmax)
    return g.add("Round", g.add("Mul", x, factor)), absmax


def bit_linear(g: Graph, x: str, layer: str, *, outputs: int, inputs: int) -> str:
    """RMSNorm, int8 quantisation and ternary product: [B, T, K] -> [B, T, N].

    Args:
      g: to add to.
      x: the input.
      layer: name of the weights: `{layer}.codes`, `.norm_scale`, `.matrix_scale`.
      outputs: N.
      inputs: K.
    """
    scale, eps = f"{layer}.norm_scale", g.config.linear_norm_eps
    if g.product == "fast":
        # The matrix's scale travels with the norm's: both are constants.
        scale = g.add("Mul", scale, f"{layer}.matrix_scale")
        normalized = rms_norm(g, x, scale, eps=eps)
        return two_bit_product(g, normalized, layer, outputs=outputs, inputs=inputs)
    q, absmax = quantize(g, rms_norm(g, x, scale, eps=eps))
    columns = padded_columns(inputs) if g.padded else inputs
    if g.padded:
        q = fill_blocks(g, q, inputs)
    product = two_bit_product if g.product == "exact" else integer_product
    sums = product(g, q, layer, outputs=outputs, inputs=columns)
    # XLA too multiplies by the reciprocal where the program divides by 127.
    q_scale = g.add("Mul", absmax, g.constant(np.float32(1) / np.float32(127)))
    row_scale = g.add("Mul", q_scale, f"{layer}.matrix_scale")
    if g.product == "integer":
        # Changes nothing: it keeps the runtime from a fusion that rounds the product otherwise.
        row_scale = g.add("Max", row_scale, g.constant(0))
    return g.add("Mul", sums, row_scale)


def padded_columns(inputs: int) -> int:
    """Columns of a matrix whose blocks have one column of padding each."""
    return -(-inputs // (BLOCK - 1)) * BLOCK


def fill_blocks(g: Graph, q: str, inputs: int) -> str:
    """[B, T, K] -> [B, T, C b]: behind each b - 1 columns one that holds 127."""
    columns = padded_columns(inputs)
    blocks = columns // BLOCK
    if missing := blocks * (BLOCK - 1) - inputs:
        q = g.add("Pad", q, g.constant([0, 0, 0, 0, 0, missing], np.int64))
    q = g.add("Reshape", q, g.constant([0, 0, blocks, BLOCK - 1], np.int64))
    q = g.add("Pad", q, g.constant([0, 0, 0, 0, 0, 0, 0, 1], np.int64), g.constant(127))
    return g.add("Reshape", q, g.constant([0, 0, columns], np.int64))


def two_bit_product(g: Graph, x: str, layer: str, *, outputs: int, inputs: int) -> str:
    """x @ trits^T by two-bit kernels: [B, T, K] float32 -> [B, T, N] float32."""
    return g.add(
        "MatMulNBits",
        x,
        f"{layer}.codes",
        ones_name(outputs, inputs),
        domain=MICROSOFT,
        N=outputs,
        K=inputs,
        bits=2,
        block_size=BLOCK,
        accuracy_level=4,
    )


def as_numbers(codes: onnx.TensorProto) -> onnx.TensorProto:
    """The bytes of stored codes, [N, C, b / 4], as a matrix [N, C b] of two-bit numbers."""
    N, C, size = codes.dims
    numbers = onnx.TensorProto()
    numbers.CopyFrom(codes)
    numbers.data_type = TensorProto.UINT2
    numbers.ClearField("dims")
    numbers.dims.extend([N, C * size * 4])
    return numbers


def ones_name(outputs: int, inputs: int) -> str:
    """The blocks' scales, which all matrices of one shape share."""
    return f"ones.{outputs * -(-inputs // BLOCK)}"


def integer_product(g: Graph, q: str, layer: str, *, outputs: int, inputs: int) -> str:
    """The same sums from integers: q float32 [B, T, K] -> [B, T, N] float32.

    The runtime unpacks the codes once, when it folds constants. All that it folds is in memory
    at the same time, which is why the codes are read as two-bit numbers and not by shifts.
    """
    if missing := -inputs % BLOCK:
        q = g.add("Pad", q, g.constant([0, 0, 0, 0, 0, missing], np.int64))
    codes = g.add("Cast", f"{layer}.codes", to=TensorProto.UINT8)
    codes = g.add("Transpose", codes, perm=[1, 0])
    shifted = g.add("Cast", g.add("Add", q, g.constant(128)), to=TensorProto.UINT8)
    sums = g.add(
        "MatMulInteger", shifted, codes, g.constant(128, np.uint8), g.constant(ZERO_CODE, np.uint8)
    )
    return g.add("Cast", sums, to=TensorProto.FLOAT)


def recurrence(g: Graph, i: str, f: str, bound: str, h0_BE: str) -> tuple[str, str]:
    """h_t = F h_{t-1} + (1 - F) silu(i), F = bound + (1 - bound) sigmoid(f), in order of time.

    Returns:
      The states [B, T, E] and the last one [B, E].
    """
    complement = g.add("Mul", g.add("Sub", g.constant(1), bound), closed_gate(g, f))
    forget = g.add("Sub", g.constant(1), complement)
    x = g.add("Mul", silu(g, i), complement)
    h_BE, h_BTE = g.add_many(
        "Scan",
        h0_BE,
        forget,
        x,
        outputs=2,
        body=recurrence_step(),
        num_scan_inputs=2,
        scan_input_axes=[1, 1],
        scan_output_axes=[1],
    )
    return h_BTE, h_BE


def recurrence_step() -> onnx.GraphProto:
    """One step: (h, F, x) -> (F h + x, the same as output)."""
    nodes = [
        helper.make_node("Mul", ["forget", "h"], ["kept"]),
        helper.make_node("Add", ["kept", "x"], ["next_h"]),
        helper.make_node("Identity", ["next_h"], ["emitted_h"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "width"])
        for name in ("h", "forget", "x", "next_h", "emitted_h")
    ]
    return helper.make_graph(nodes, "recurrence_step", values[:3], values[3:])


class Matrix(NamedTuple):
    """A linear layer: the name of its weights, and its size."""

    name: str
    outputs: int
    inputs: int


def linears(
    g: Graph,
    layers: Sequence[Matrix],
    x: str,
    *,
    outer_norm: str | None = None,
    residual: str | None = None,
    times_silu: str | None = None,
    gated: bool = False,
    **_: Any,
) -> tuple[str, list[str]]:
    """`layer.Linears` as nodes."""
    if residual is not None:
        x = g.add("Add", x, residual)
    u = x
    if gated:
        gate, up = g.add_many("Split", x, outputs=2, axis=-1, num_outputs=2)
        u = g.add("Mul", silu(g, gate), up)
    if outer_norm is not None:
        u = rms_norm(g, u, outer_norm, eps=g.config.norm_eps)
    if times_silu is not None:
        u = g.add("Mul", u, silu(g, times_silu))
    return x, [bit_linear(g, u, m.name, outputs=m.outputs, inputs=m.inputs) for m in layers]


def layer_weights(
    config: ModelConfig, number: int
) -> tuple[MLGRUWeights[Matrix, str], GLUWeights[Matrix, str]]:
    """The names of a layer's tensors."""
    D, E, M = config.hidden_size, config.state_size, config.glu_size
    name = f"layers.{number}"
    mixer = MLGRUWeights(
        norm=f"{name}.mixer_norm",
        i_proj=Matrix(f"{name}.i_proj", E, D),
        f_proj=Matrix(f"{name}.f_proj", E, D),
        g_proj=Matrix(f"{name}.g_proj", E, D),
        gate_norm=f"{name}.gate_norm",
        o_proj=Matrix(f"{name}.o_proj", D, E),
        lower_bound=f"{name}.lower_bound",
    )
    gate_up, down = Matrix(f"{name}.gate_up_proj", 2 * M, D), Matrix(f"{name}.down_proj", D, M)
    return mixer, GLUWeights(f"{name}.glu_norm", gate_up, down)


def embed(g: Graph, tokens: str, *, dtype: str) -> str:
    """The tokens' rows of the table, float32."""
    rows = g.add("Gather", "embedding", tokens)
    if dtype == "float32":
        return rows
    rows = g.add("Cast", rows, to=TensorProto.FLOAT)
    if dtype == "int8":
        rows = g.add("Mul", rows, g.add("Gather", "embedding.scale", tokens))
    return rows


def head(g: Graph, x: str) -> str:
    """Final norm and logits of the last token: [B, T, D] -> [B, V]."""
    c = g.config
    last = g.add("Gather", x, g.constant([-1], np.int64), axis=1)
    matrix = Matrix("head", c.vocab_size, c.hidden_size)
    _, (logits,) = linears(g, [matrix], last, outer_norm="final_norm")
    return g.add("Squeeze", logits, g.constant([1], np.int64))


def language_model(config: ModelConfig, *, product: Product, padded: bool, embedding: str) -> Graph:
    """The whole graph, from `tokens` and `state` to `logits` and `next_state`.

    Args:
      config: of the model; MatMul-free throughout.
      product: of the BitLinears.
      padded: whether the stored codes have a column of weight zero in each block.
      embedding: dtype of the stored table: "float32", "bfloat16" or "int8".
    """
    g = Graph(config, product, padded)
    ops = layer.Operations(functools.partial(linears, g), functools.partial(recurrence, g))
    x, update = embed(g, "tokens", dtype=embedding), None
    states = []
    for number in range(config.num_layers):
        mixer, glu = layer_weights(config, number)
        h0_BE = g.add("Gather", "state", g.constant(number, np.int64), axis=0)
        x, update, h_BE = layer.mlgru(ops, mixer, x, update, h0_BE)
        x, update = layer.glu(ops, glu, x, update)
        states.append(g.add("Unsqueeze", h_BE, g.constant([0], np.int64)))
    assert update is not None  # there is at least one layer
    x = g.add("Add", x, update)
    g.nodes.append(helper.make_node("Concat", states, ["next_state"], axis=0))
    g.nodes.append(helper.make_node("Identity", [head(g, x)], ["logits"]))
    return g


def to_model(g: Graph, tensors: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
    """The graph as a model file.

    Args:
      g: the graph.
      tensors: the stored weights, by reference to the data file; those that are not read are
        left out.
    """
    read = {name for node in g.nodes for name in node.input}
    used = [tensor for tensor in tensors if tensor.name in read]
    if missing := read - {t.name for t in used} - _computed(g) - {"tokens", "state"}:
        raise ValueError(f"the graph reads tensors that are not stored: {sorted(missing)[:3]}")
    if g.product == "integer":
        used = [as_numbers(t) if t.name.endswith(".codes") else t for t in used]
    c = g.config
    state = [c.num_layers, "batch", c.state_size]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        g.nodes,
        "mmfree",
        [
            value("tokens", TensorProto.INT64, ["batch", "time"]),
            value("state", TensorProto.FLOAT, state),
        ],
        [
            value("logits", TensorProto.FLOAT, ["batch", c.vocab_size]),
            value("next_state", TensorProto.FLOAT, state),
        ],
        [*used, *g.constants.values()],
    )
    opsets = [helper.make_opsetid("", OPSETS[g.product]), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSIONS[g.product], producer_name="mmfree-jax"
    )


def _computed(g: Graph) -> set[str]:
    return {name for node in g.nodes for name in node.output} | set(g.constants)

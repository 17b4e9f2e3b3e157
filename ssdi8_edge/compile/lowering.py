"""Everything that is specific to TensorRT about the graph.

* Function bodies go: before TensorRT 10.7 the parser prefers a local function to a plugin of the
  same name. Ops without a plugin are inlined instead.
* Plugin nodes get `plugin_version` and `plugin_namespace`, which every parser understands.
* `logits_to_keep` becomes the constant 1: an engine returns the last position.
* Parser field types are INT32, FLOAT32 and strings, so nothing else may be an attribute.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import inliner

from ssdi8_edge.ops import OPS
from ssdi8_edge.ops.op import DOMAIN

PLUGIN_VERSION = "1"
PLUGIN_NAMESPACE = ""


def inline_standard_ops(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the ops that have no plugin by their bodies; the others keep theirs."""
    standard = [(f.domain, f.name) for f in model.functions if not OPS[f.name].plugin]
    return inliner.inline_selected_functions(model, standard)


def inline_all(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in standard ops alone."""
    return inliner.inline_local_functions(model)


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model.onnx` for TensorRT from `export_model(…, form="tensorrt")`."""
    model = inline_standard_ops(model)
    del model.functions[:]
    graph = gs.import_onnx(model)
    for node in graph.nodes:
        # One that is used with other attributes has a number behind its domain.
        if (node.domain or "").split(".")[0] == DOMAIN:
            node.domain = DOMAIN
            node.attrs["plugin_version"] = PLUGIN_VERSION
            node.attrs["plugin_namespace"] = PLUGIN_NAMESPACE
    keep = next(tensor for tensor in graph.inputs if tensor.name == "logits_to_keep")
    graph.inputs.remove(keep)
    keep.to_constant(np.array(1, dtype=np.int64))
    graph.toposort()
    return gs.export_onnx(graph)

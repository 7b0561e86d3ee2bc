"""The smallest model as torch.onnx leaves one."""

import onnx_ir as ir

from fope_export.graph.passes import SCOPES


def torchs() -> ir.Model:
    """Its node is numbered, and has the modules that it came from."""
    model = ir.from_onnx_text(
        '<ir_version: 11, opset_import: ["": 23]> g (float[s1] x) => (float[s1] y) { y = Neg (x) }'
    )
    node = model.graph.node(0)
    node.name, node.metadata_props[SCOPES] = "node_Neg_0", "['', 'layers.0', 'neg']"
    return model

"""Linear layers whose weights lie as oneDNN multiplies them: for reading on the CPU, not for training.

`F.linear` lays a float32 weight out anew at every call; here that is done once. What PyTorch's own compiler does to
frozen weights, by the same two operators.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrepackedLinear(nn.Module):
    """x Wᵀ + b as `layer` computes it, to float32 rounding."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        bias = None if layer.bias is None else layer.bias.detach()
        self.register_buffer("bias", bias, persistent=False)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())  # opaque: no module's tensor

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def prepack(module: nn.Module) -> nn.Module:
    """`module` with its float32 linear layers on the CPU replaced, in place; on other devices, and where PyTorch has no
    such operators, as it was. Afterwards it can neither be trained nor saved.
    """
    operators = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not (torch.backends.mkldnn.is_available() and operators):
        return module
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32):
                setattr(parent, name, PrepackedLinear(layer))
    return module

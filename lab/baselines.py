"""What the paper compares with. Shapes as in stgc.py: T tokens, E experts, D hidden size; P projected size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stgc import widen


class CosineRouter(nn.Module):
    """Logits from cosines, as DynMoE's and EMoE's GLUE runs have them (LINs-lab/DynMoE at 4927232, after GMoE).

    z = normalise(W x + b) . normalise_columns(S) * exp(min(t, log 100)), x_TD -> logits_TE, in at least float32 even under
    autocast. t is learnt from log 2, so that the logits start within [-2, 2] and never leave [-100, 100]: a conflict loss
    that pushes them meets a bound, which a linear router does not have.
    """

    START, LIMIT, SPREAD = math.log(2), math.log(100), 0.01  # of t, of t, standard deviation of S

    def __init__(self, d_model: int, num_experts: int, d_project: int = 256, **factory):
        super().__init__()
        self.project = nn.Linear(d_model, d_project, **factory)
        self.experts_PE = nn.Parameter(torch.empty(d_project, num_experts, **factory).normal_(std=self.SPREAD))
        self.log_scale = nn.Parameter(torch.full((), self.START, **factory))

    def forward(self, x_TD: Tensor) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TP = F.linear(widen(x_TD), widen(self.project.weight), widen(self.project.bias))
            cosines_TE = F.normalize(x_TP, dim=1) @ F.normalize(widen(self.experts_PE), dim=0)
            return cosines_TE * widen(self.log_scale).clamp(max=self.LIMIT).exp()

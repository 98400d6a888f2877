"""Loss scaling for fp16 parameters, decided alike on every rank."""

from __future__ import annotations

import torch
from torch import Tensor


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler whose found_inf is agreed by all ranks of a DistributedMuon.

    The stock scaler looks at each rank's own p.grad, so ranks would skip steps and change the loss scale
    differently. This one unscales and checks the reduced shards.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if not hasattr(optimizer, "unscale_gradients"):
            return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        found_inf.fill_(float(optimizer.unscale_gradients(float(inv_scale))))
        return {found_inf.device: found_inf}

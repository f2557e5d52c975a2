"""Token shift by rows in place of channels, for models that exist.

    W (mu * x_t + (1 - mu) * x_{t-1})  ->  s * W x_t + (1 - s) * W x_{t-1},    s_j = sum_i W_ji^2 mu_i / sum_i W_ji^2

mu is a share for each channel, s one for each row: the s of least squares, if the channels of x, and those of the token
before, are independent and vary alike (a LayerNorm stands before W). Training does the rest; `spikegpt-reviews` needs
some hundred steps. With shares for rows what reads a token is one product for all shares, so in a model of integer
spikes it is the residual stream itself that is read (README.md, design M).
"""

from typing import cast

import torch

from ..model import SRFFN, SRWKV
from .spiking import Model, changed_config, require_convertible


@torch.no_grad()
def mix_rows(model: Model) -> Model:
    """A new model of the same class and weights with `token_shift="rows"`, see the top of this file; `model` itself is
    returned where it has that already.

    Raises:
        ValueError: `model` is of another kind, has adapters or packed weights, or its matrices read integer spikes.
    """
    require_convertible(model)
    if model.config.token_shift == "rows":
        return model
    with torch.device("meta"):
        mixed = type(model)(changed_config(model, token_shift="rows"))
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for path, half in model.named_modules():
        if isinstance(half, SRWKV | SRFFN):
            for reader in half.readers:
                name = f"time_mix_{reader[0]}"
                power = cast(torch.Tensor, half.get_submodule(reader).weight).double().square()
                share = half.get_parameter(name)
                rows = power @ share.flatten().double() / power.sum(dim=1).clamp(min=torch.finfo(power.dtype).tiny)
                weights[f"{path}.{name}"] = rows.to(share.dtype).view(1, 1, -1)
    mixed.load_state_dict(weights, assign=True)
    mixed.tie_weights()
    return mixed.requires_grad_().train(model.training)

"""Dropout in one pass over memory, drawn in parallel; torch's own draws one number after the other on the CPU."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .backend import bind, use_extension


class Dropout(nn.Dropout):
    """`nn.Dropout`: in training each number is 0 with probability p, else divided by 1 - p.

    With the compiled kernel the mask is a hash of the position and of one number drawn from torch's generator: seeds
    and gradient checkpointing work as ever, but one seed drops other numbers than it does in plain torch.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.drops:
            return x
        if self.p == 1 or self.inplace or not use_extension("auto", x.device):
            return super().forward(x)
        return torch.ops.spikegpt_lora.dropout(x, self.seed(x.device), self.p)

    @property
    def drops(self) -> bool:
        """Whether it does anything now."""
        return self.training and self.p > 0

    def seed(self, device: torch.device) -> Tensor:
        """`(1,)`, drawn from torch's generator: with it, a kernel knows what one call drops."""
        return torch.randint(2**62, (1,), device=device)


def set_dropout(model: PreTrainedModel, dropout: float) -> PreTrainedModel:
    """`model` with another dropout probability after each block, its configuration included; changed in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.config.dropout = dropout
    return model


@bind
def _bind() -> None:
    torch.library.register_fake("spikegpt_lora::dropout", lambda x, seed, p: x.new_empty(x.shape))

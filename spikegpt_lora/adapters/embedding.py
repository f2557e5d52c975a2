"""An embedding with a SpikeLoRA adapter: h = E[x] + s B (SN(A[x]) * A[x]), x a token, A[x] its r numbers; binary:
h = E[x] + s B SN(A[x]); integer: h = E[x] + s B diag(w) k(A[x]).

peft starts an embedding's A at 0 and draws its B. At A[x] = 0 a graded gate is silent and its gradient 0, so it would
stay so for good: here A is drawn, from N(0, 1) as the rows of an nn.Embedding are, and B starts at 0, as in every other
layer. B belongs to all tokens, so training moves those too that it never shows; stock LoRA leaves them where they were.
"""

from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import Tensor, nn

from . import sequence
from .layer import SpikeLoraVariant, SpikingLayer


class SpikeLoraEmbeddingVariant(SpikeLoraVariant):
    """`SpikeLoraVariant` of an embedding."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config, **kwargs):
        SpikeLoraVariant.init(module, adapter_name, config)
        if config.init_lora_weights:
            a, padding = module.lora_embedding_A[adapter_name], module.get_base_layer().padding_idx
            nn.init.normal_(a)
            nn.init.zeros_(module.lora_embedding_B[adapter_name])
            if padding is not None:  # has no gradient, and stays where it is
                nn.init.zeros_(a[:, padding])

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        a = module._embed(x, module.lora_embedding_A[active_adapter].T)
        gate, b = module.lora_gate[active_adapter], module.lora_embedding_B[active_adapter]
        added = nn.functional.linear(gate.passed(a), gate.outwards(b)) * module.scaling[active_adapter]
        scale = module._get_embed_scale()  # Gemma's embeddings multiply what they give
        return result + (added if scale is None else added * scale.to(added.dtype))


class SpikeLoraEmbedding(SpikingLayer, Embedding):
    """peft's LoRA Embedding, of torch.nn.Embedding, whose adapters may spike."""

    variant = SpikeLoraEmbeddingVariant

    def _mixed_batch_forward(self, x: Tensor, *args, adapter_names: list[str], **kwargs) -> Tensor:
        """peft's own, which asks no variant, for the rows of plain adapters; then the others."""
        plain = ["__base__" if name in self.lora_gate else name for name in adapter_names]
        result = super()._mixed_batch_forward(x, *args, adapter_names=plain, **kwargs)
        with sequence.mixed(adapter_names):
            for adapter in set(adapter_names) & set(self.lora_gate):
                rows = [row for row, name in enumerate(adapter_names) if name == adapter]
                result[rows] = self.variant.forward(self, adapter, x[rows], result[rows]).to(result.dtype)
        return result

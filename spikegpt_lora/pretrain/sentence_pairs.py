"""Next-sentence pairs: a second task of pre-training, for sentence vectors that classify better.

Of P pairs of neighbouring sentences, each first one has to find its second one among all P, and the other way round
(Logeswaran & Lee 2018, arXiv 1803.02893, with the loss of InfoNCE). Every sentence is read alone, from a fresh state,
as a classifier will read it: its vector is the classifier's [last, mean].
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..model import SpikeGPTForCausalLM, pool

SHORTEST, LONGEST = 6, 64  # tokens of a sentence that is used
TEMPERATURE = 0.07
WIDTH = 256  # of the vectors that are compared


class SentencePairs(nn.Module):
    """Draws pairs of neighbouring sentences and compares them; its two matrices are needed in training only.

    Args:
        tokens: token ids `(N,)` of a text.
        tokenizer: the one that made them; a sentence ends at its ".", "!" or "?", or at the end of a document.
        count: pairs a step, P.
        n_embd: width of the model.
        seed: what is drawn depends on it and the step alone.

    Raises:
        ValueError: fewer than 8 P pairs in the text.
    """

    def __init__(self, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, count: int, n_embd: int, seed: int):
        super().__init__()
        self.tokens, self.count, self.seed = tokens, count, seed
        self.starts, self.stops, self.first = _neighbours(tokens, tokenizer)
        if len(self.first) < 8 * count:
            raise ValueError(
                f"{count} pairs a step need {8 * count:,} pairs of neighbouring sentences of {SHORTEST} to {LONGEST} "
                f"tokens, the text has {len(self.first):,}"
            )
        self.left = nn.Linear(2 * n_embd, WIDTH, bias=False)
        self.right = nn.Linear(2 * n_embd, WIDTH, bias=False)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Ids `(2 P, T)` and attention mask: P sentences, then the one that follows each. P pairs of similar length,
        so that there is little padding, out of 8 P."""
        draw = np.random.default_rng((self.seed, step))
        first = draw.choice(self.first, 8 * self.count)
        first = first[np.argsort(np.maximum(self._length(first), self._length(first + 1)), kind="stable")]
        first = first[(place := draw.integers(8) * self.count) : place + self.count]
        chosen = np.concatenate([first, first + 1])
        places = np.arange(self._length(chosen).max())
        mask = places < self._length(chosen)[:, None]
        where = np.minimum(self.starts[chosen][:, None] + places, len(self.tokens) - 1)
        ids = np.where(mask, self.tokens[where].astype(np.int64), 0)
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))

    def _length(self, sentences: np.ndarray) -> np.ndarray:
        return self.stops[sentences] - self.starts[sentences]

    def loss(self, model: SpikeGPTForCausalLM, step: int, bf16: bool) -> Tensor:
        """Mean over both directions of -log p(the right neighbour), in nats; log P is chance."""
        ids, mask = (tensor.to(model.device) for tensor in self.draw(step))
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            hidden = model.spikegpt(ids, attention_mask=mask).last_hidden_state
        first, second = pool(hidden.float(), mask, "last_mean").chunk(2)
        likeness = F.normalize(self.left(first), dim=1) @ F.normalize(self.right(second), dim=1).T / TEMPERATURE
        right = torch.arange(self.count, device=likeness.device)
        return (F.cross_entropy(likeness, right) + F.cross_entropy(likeness.T, right)) / 2


def _neighbours(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where sentences start and stop, and which of them have a neighbour after them in the same document."""
    document = tokens == tokenizer.eos_token_id
    end = np.isin(tokens, [ids[-1] for ids in tokenizer([".", "!", "?"])["input_ids"]]) | document
    starts = np.flatnonzero(end[:-1] & ~end[1:]) + 1  # "..." and "?!" are one end
    starts, stops = starts[:-1], starts[1:]
    right_size = (stops - starts >= SHORTEST) & (stops - starts <= LONGEST)
    last = np.add.reduceat(document, starts, dtype=np.int64)[: len(starts)] > 0 if len(starts) else np.zeros(0, bool)
    return starts, stops, np.flatnonzero(right_size[:-1] & right_size[1:] & ~last[:-1])

"""The frozen lower blocks of a SpikeGPT computed once, where all that is trained stands above them.

    input of block k = e + n      e: what block 0 makes of the embedding's spikes; n: spikes of all LIFs below, counted

n is one byte a token and channel, whatever the model's precision: 53 MB for Subj at 4 x 256, where float32 takes four
times that. Below block k nothing drops out, as in evaluation. The idea is Skip2-LoRA's (Matsutani et al. 2024, arXiv
2410.21073), which caches what a network of real numbers gives.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Value
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...forward import hooked, run, token_model
from ...model import SpikeGPTModel
from .step_change import StepChange, own_forward, swapped

COUNTS = "counts"  # a column: n of a text, T * C bytes
BATCH = 32


def cached_trunk(model: nn.Module, dataset: Dataset, blocks: int) -> Dataset:
    """`dataset`, with a column input_ids, and the column `counts`: what the lower `blocks` blocks of `model` add to the
    residual stream. To train on it: `CachedTrunk(blocks)` as a callback, `CountsCollator` as the data collator, and
    `TrainingArguments(remove_unused_columns=False)`.

    Raises:
        ValueError: `model` holds no SpikeGPT, it has not more blocks than that, or something below is trained.
    """
    inner = _frozen_below(model, blocks)
    texts, counts = dataset["input_ids"], [b""] * len(dataset)
    order = sorted(range(len(dataset)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(texts[row]) for row in rows], batch_first=True)
        lengths = torch.tensor([len(texts[row]) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        for row, length, found in zip(rows, lengths.tolist(), _counts(inner, ids, mask, blocks)):
            counts[row] = found[:length].tobytes()
    return dataset.add_column(COUNTS, counts, feature=Value("binary"))


class CountsCollator:
    """Batches of texts, where they have it with what `cached_trunk` found, as `inputs_embeds` `(B, T, C)` uint8; padded
    as the tokenizer pads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        kept = [{name: value for name, value in row.items() if name != COUNTS} for row in rows]
        batch = self.tokenizer.pad(kept, return_tensors="pt")
        batch["labels"] = batch.pop("label") if "label" in batch else batch["labels"]
        if COUNTS not in rows[0]:
            return dict(batch)
        mask = batch["attention_mask"].bool()
        counts = [np.frombuffer(row[COUNTS], np.uint8).reshape(len(row["input_ids"]), -1) for row in rows]
        embeds = torch.zeros(*mask.shape, counts[0].shape[1], dtype=torch.uint8)
        embeds[mask] = torch.from_numpy(np.concatenate(counts))
        return {**batch, "inputs_embeds": embeds}


class CachedTrunk(StepChange):
    """A Trainer's callback: of batches with the counts of `cached_trunk`, the blocks from `blocks` on are computed;
    others, in evaluation say, are read from the text.

    Raises, when the training begins:
        ValueError: as `cached_trunk`; training data without the column `counts`.
    """

    shared = True

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks

    def begin(self, model, seed=0, batches=None):
        inner = _frozen_below(model, self.blocks)
        self.opened.enter_context(own_forward(inner, partial(_upper, inner, inner.forward, self.blocks)))

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        names = getattr(getattr(train_dataloader, "dataset", None), "column_names", None) or []
        if COUNTS not in names:
            raise ValueError(
                f"the training data have no column {COUNTS!r}: make it with cached_trunk, and keep it with "
                "TrainingArguments(remove_unused_columns=False)"
            )
        super().on_train_begin(args, state, control, train_dataloader=train_dataloader, **kwargs)


class _Passed(nn.Module):
    """In the place of the embedding's spikes, where a residual stream is given."""

    def step(self, x: Tensor, membrane: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return x, None


def _upper(
    inner: SpikeGPTModel,
    whole: Callable,
    blocks: int,
    input_ids=None,
    attention_mask=None,
    inputs_embeds=None,
    *rest,
    **more,
):
    if input_ids is None or inputs_embeds is None:
        return whole(input_ids, attention_mask, inputs_embeds, *rest, **more)
    with torch.no_grad():
        x = _first(inner, input_ids, attention_mask)
        x += inputs_embeds.to(x.dtype)
    upper = nn.ModuleList(list(inner.blocks)[blocks:])
    with swapped([(inner, "blocks", upper), (inner, "emb_spike", _Passed())]):
        return whole(None, attention_mask, x, *rest, **more)


def _first(inner: SpikeGPTModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """e of each token, `(B, T, C)`."""
    mask = None if attention_mask is None else attention_mask.bool()
    spikes, _ = inner.emb_spike.step(inner.emb(input_ids), mask=mask)
    block = inner.blocks[0]
    return (block.ln0 if hasattr(block, "ln0") else block.amplitude0)(spikes)


def _counts(inner: SpikeGPTModel, ids: Tensor, mask: Tensor, blocks: int) -> np.ndarray:
    """n of each token, `(B, T, C)` uint8."""
    seen: list[Tensor] = []
    with hooked([inner.blocks[blocks].register_forward_pre_hook(lambda block, args: seen.append(args[0]))]):
        run(inner, {"input_ids": ids, "attention_mask": mask})
    with torch.no_grad():
        found = (seen[0] - _first(inner, ids.to(seen[0].device), mask.to(seen[0].device))).round()
    return found.to(torch.uint8).cpu().numpy()


def _frozen_below(model: nn.Module, blocks: int) -> SpikeGPTModel:
    """The SpikeGPT inside `model`."""
    inner = token_model(model)
    if not isinstance(inner, SpikeGPTModel):
        raise ValueError(f"a trunk's spikes are counted of a SpikeGPT, got a {type(model).__name__}")
    if not 1 <= blocks < min(len(inner.blocks), 128):
        raise ValueError(f"blocks, how many are computed once, must be in 1 ... {len(inner.blocks) - 1}, got {blocks}")
    parts = [("emb", inner.emb), *((f"blocks.{number}", inner.blocks[number]) for number in range(blocks))]
    for path, part in parts:
        if trained := next((name for name, p in part.named_parameters() if p.requires_grad), None):
            raise ValueError(
                f"{path}.{trained} is trained, so the blocks below {blocks} change: adapt those above, "
                f"target_modules=r'.*blocks\\.({'|'.join(map(str, range(blocks, len(inner.blocks))))})\\...', or none "
                "of them"
            )
    return inner

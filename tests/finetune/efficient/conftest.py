"""Small models of every kind that a callback knows, and a Trainer around them."""

import pytest
import torch
from datasets import Dataset
from efficient_models import KINDS, adapted_model
from torch import nn
from transformers import Trainer, TrainingArguments


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return adapted_model(kind)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[0, 6:] = 0
    ids = torch.randint(1, 37, (4, 9), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(2)
    return Dataset.from_dict(
        {
            "input_ids": torch.randint(1, 37, (32, 9), generator=generator).tolist(),
            "attention_mask": torch.ones(32, 9, dtype=torch.long).tolist(),
            "labels": (torch.arange(32) % 2).tolist(),
        }
    )


@pytest.fixture
def trainer_of(tmp_path, rows):
    """Called with a model and callbacks: a Trainer of eight steps."""

    def make(model: nn.Module, *callbacks, data=rows, **arguments) -> Trainer:
        arguments = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | arguments
        settings = TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            **arguments,
        )
        return Trainer(model=model, args=settings, train_dataset=data, callbacks=list(callbacks))

    return make

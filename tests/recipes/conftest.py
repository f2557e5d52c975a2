"""What the tests of the recipes share."""

import pytest
from peft import get_peft_model

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, SpikeLoraConfig, load_task
from spikegpt_lora.pretrain.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The folder of a fine-tuning run: base/ and spikelora/."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(load_task("subj-mini")["train"]["text"], 300)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2}
    config = SpikeGPTConfig(**sizes, pooling="last_mean", pad_token_id=tokenizer.pad_token_id, num_labels=2)
    SpikeGPTForSequenceClassification(config).save_pretrained(folder / "base")
    model = SpikeGPTForSequenceClassification.from_pretrained(folder / "base")
    get_peft_model(model, SpikeLoraConfig(task_type="SEQ_CLS", r=4)).save_pretrained(folder / "spikelora")
    for part in ("base", "spikelora"):
        tokenizer.save_pretrained(folder / part)
    return folder

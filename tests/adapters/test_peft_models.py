"""SpikeLoRA with stock peft on transformers' own architectures, built from small random configs."""

import json

import pytest
import torch
from datasets import Dataset
from helpers import adapted, largest_difference, padded_batch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.adapters import SparsityCallback, SparsityController, SpikeGate
from spikegpt_lora.observe.adapters import observe_adapters

TINY = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**TINY)), "SEQ_CLS", ["query", "value", "dense"]),
    "deberta": (
        lambda: DebertaV2ForSequenceClassification(
            DebertaV2Config(
                **TINY, relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=8
            )
        ),
        "SEQ_CLS",
        ["query_proj", "key_proj", "value_proj", "dense"],
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), "CAUSAL_LM", ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
        "CAUSAL_LM",
        ["c_attn", "c_proj"],
    ),
}


def base(name):
    set_seed(0)
    return MODELS[name][0]()


def trained(name, config=SpikeLoraConfig, **changes):
    _, task_type, targets = MODELS[name]
    settings = {"task_type": task_type, "target_modules": targets, "r": 4}
    return adapted(base(name), config(**settings | changes), seed=1, dtype=torch.float32)


def batch(labels=False):
    return padded_batch([5, 9, 9, 9]) | ({"labels": torch.tensor([0, 1, 1, 0])} if labels else {})


@pytest.mark.parametrize("name", MODELS)
def test_every_target_has_a_gate_and_every_adapter_learns(name):
    model = trained(name, spikelora_v_threshold=0.0).train()  # so that many fire in so small a model
    gates = [module for module in model.modules() if isinstance(module, SpikeGate)]
    layers = [module for module in model.modules() if hasattr(module, "lora_gate")]
    assert len(gates) == len(layers) > 4
    given = batch(labels=True) if MODELS[name][1] == "SEQ_CLS" else batch() | {"labels": batch()["input_ids"]}
    model(**given).loss.backward()
    assert all(p.grad is not None and p.grad.any() for key, p in model.named_parameters() if "lora_B" in key)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("time", ["pointwise", "token"])
def test_saved_adapters_come_back_bit_for_bit(name, time, tmp_path):
    if name == "deberta" and time == "token":
        pytest.skip("its projections are refused in token time")
    targets = [target for target in MODELS[name][2] if target != "dense"]  # BERT's pooler is one, and no row of tokens
    changes = {"target_modules": targets, "spikelora_time": time, "spikelora_learn": "both", "spikelora_gate": "binary"}
    model = trained(name, rank_pattern={targets[0]: 2}, alpha_pattern={targets[-1]: 3}, use_rslora=True, **changes)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name), tmp_path).eval()
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(saved[key] == value for key, value in changes.items() if key.startswith("spikelora"))


@pytest.mark.parametrize("name", MODELS)
def test_disabled_adapters_are_the_base_model_bit_for_bit(name):
    model = trained(name)
    with model.disable_adapter():
        assert torch.equal(model(**batch()).logits, base(name).eval()(**batch()).logits)
    assert not torch.equal(model(**batch()).logits, base(name).eval()(**batch()).logits)


@pytest.mark.parametrize("name", MODELS)
def test_without_the_gate_it_is_stock_lora_bit_for_bit(name):
    results = []
    for config, changes in ((LoraConfig, {}), (SpikeLoraConfig, {"use_spikelora": False})):
        model = trained(name, config, **changes).train()
        set_seed(2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            model(**batch()).logits.pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.eval()(**batch()).logits)
    assert torch.equal(*results)


def trainer(model, folder, steps, callbacks=()):
    rows = [{key: value[i].tolist() for key, value in batch(labels=True).items()} for i in range(4)] * 4
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2, use_cpu=True,
        lr_scheduler_type="constant",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none",
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Dataset.from_list(rows), callbacks=list(callbacks))


def test_a_trainer_that_resumes_ends_where_a_straight_one_does_thresholds_included(tmp_path):
    """With gradient checkpointing, token time and a controller: what moves the thresholds is resumed with them."""
    ends = []
    settings = {"spikelora_time": "token", "target_modules": ["query", "value"], "spikelora_target_sparsity": 0.8}
    for stretches in ((4,), (2, 4)):
        for steps in stretches:
            set_seed(0)
            run = trainer(trained("bert", **settings), tmp_path / str(len(stretches)), steps, [SparsityCallback()])
            run.train(resume_from_checkpoint=steps != stretches[0])
        gates = [m for m in run.model.modules() if isinstance(m, SpikeGate)]
        ends.append(({k: p.clone() for k, p in run.model.named_parameters()}, [gate.v_threshold for gate in gates]))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6) and all(v != 0.1 for v in ends[0][1])


def test_thresholds_of_the_best_checkpoint_come_back_with_it(tmp_path):
    model = trained("bert")
    model.save_pretrained(tmp_path)
    expected = model(**batch()).logits
    for module in model.modules():
        if isinstance(module, SpikeGate):
            module.v_threshold = 5.0
    assert not torch.equal(model(**batch()).logits, expected)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model.eval()(**batch()).logits, expected)


def test_several_adapters_switch_and_mix():
    model = trained("bert")
    model.add_adapter("other", SpikeLoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B.other" in key:
                p.normal_()
    model.eval()
    rows = []
    for name in ("default", "other"):
        model.set_adapter(name)
        rows.append(model(**batch()).logits)
    with model.disable_adapter():
        rows.append(model(**batch()).logits)
    names = ["default", "other", "__base__", "other"]
    mixed = model(**batch(), adapter_names=names).logits
    for i, name in enumerate(names):
        assert largest_difference(mixed[i], rows[["default", "other", "__base__"].index(name)][i]) < 1e-5


def test_a_compiled_model_gives_the_same_and_is_one_graph():
    model = trained("llama")
    expected = model(**batch()).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert largest_difference(compiled(**batch()).logits, expected) < 1e-5


def test_debertas_positions_are_not_counted():
    model = trained("deberta")
    with observe_adapters(model) as seen:
        model(**batch())
    activity = seen.activity()
    name = next(name for name in activity.modules if name.endswith("layer.0.attention.self.query_proj"))
    fired = []
    layer = model.get_submodule(f"{name}.lora_gate.default")
    handle = layer.register_forward_hook(lambda module, inputs, output: fired.append(output))
    model(**batch())
    handle.remove()
    real = batch()["attention_mask"].bool()
    assert [tuple(x.shape[:2]) for x in fired] == [(4, 9), (1, 16)]
    assert activity.modules[name]["sparsity"] == pytest.approx(1 - fired[0][real].mean().item(), abs=1e-6)
    assert any("pooler" in name for name in activity.left_out)


def test_the_authors_folders_load_with_a_notice(tmp_path, caplog):
    model = trained("bert", spikelora_v_threshold=0.25)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    theirs = {k: v for k, v in saved.items() if not k.startswith("spikelora")} | {"peft_type": "LORA"}
    file.write_text(json.dumps(theirs | {"spikelora_v_threshold": 0.25}))
    with caplog.at_level("WARNING", "spikegpt_lora"):
        config = SpikeLoraConfig.from_pretrained(tmp_path)
    assert "of the authors' fork" in caplog.text and config.use_spikelora and config.spikelora_v_threshold == 0.25
    loaded = PeftModel.from_pretrained(base("bert"), tmp_path, config=config).eval()
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_a_stock_lora_folder_read_as_spikelora_stays_plain(tmp_path):
    model = trained("bert", LoraConfig)
    model.save_pretrained(tmp_path)
    config = SpikeLoraConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("bert"), tmp_path, config=config).eval()
    assert not config.use_spikelora and torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_another_base_model_is_an_error_that_names_what_does_not_fit(tmp_path):
    trained("bert").save_pretrained(tmp_path)
    other = BertForSequenceClassification(BertConfig(**TINY | {"hidden_size": 24}))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_A.default.weight.*16.*24"):
        PeftModel.from_pretrained(other, tmp_path)
    with pytest.raises(ValueError, match="Target modules .* not found"):
        PeftModel.from_pretrained(base("gpt2"), tmp_path)


def test_an_adapter_adds_one_number_a_module_to_the_file(tmp_path):
    sizes = []
    for config in (LoraConfig, SpikeLoraConfig):
        trained("llama", config).save_pretrained(tmp_path)
        sizes.append(load_file(tmp_path / "adapter_model.safetensors"))
    assert {key for key in sizes[1].keys() - sizes[0].keys()} == {
        key.replace("lora_A.weight", "lora_gate._extra_state") for key in sizes[0] if "lora_A" in key
    }


def gradients_of_half(rank, folder):
    """One of two processes: its half of the batch, under DistributedDataParallel."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    plain = trained("bert", **TOKEN).double()
    model = torch.nn.parallel.DistributedDataParallel(plain)
    half = {key: value[2 * rank : 2 * rank + 2] for key, value in batch().items()}
    model(**half).logits.pow(2).sum().backward()
    with SparsityController(plain, 0.9) as controller:
        plain.train()
        plain(**half)
        controller.step()
    thresholds = torch.tensor([m.v_threshold for m in plain.modules() if isinstance(m, SpikeGate)])
    torch.save(thresholds, f"{folder}/thresholds{rank}.pt")
    torch.save(
        {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


TOKEN = {"spikelora_time": "token", "target_modules": ["query", "value"]}


def test_two_processes_have_the_gradients_of_the_whole_batch_and_the_same_thresholds(tmp_path):
    torch.multiprocessing.spawn(gradients_of_half, (str(tmp_path),), nprocs=2)
    model = trained("bert", **TOKEN).double()
    model(**batch()).logits.pow(2).sum().backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, p in model.named_parameters():
            if p.grad is not None:
                assert largest_difference(2 * found[name], p.grad) < 1e-9  # DDP gives the mean of the two
    thresholds = [torch.load(tmp_path / f"thresholds{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*thresholds) and (thresholds[0] != 0.1).all()

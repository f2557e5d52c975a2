"""Recorded spikes and adapter statistics: right names, right shapes, real tokens only, nothing left behind."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers import adapted, largest_difference
from peft import LoraConfig, get_peft_model
from spikingjelly.activation_based import functional, monitor

from spikegpt_lora import SpikeLoraConfig, SpikeTrace, record_spikes
from spikegpt_lora.forward import run
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.observe.adapters import observe_adapters
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.utils.errors import DamagedFile

LIFS = ["emb"] + [f"blocks.{i}.lif{n}" for i in range(3) for n in (1, 2)]


def spiking(classifier, **settings):
    return adapted(classifier, SpikeLoraConfig(task_type="SEQ_CLS", r=4, **settings))


def batch_of(ids, side="right"):
    lengths = torch.tensor([9, 5, 1, 7])
    steps = torch.arange(9)
    mask = steps < lengths[:, None] if side == "right" else steps >= 9 - lengths[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": torch.tensor([1, 0, 0, 1])}


def test_every_population_is_recorded_under_its_clean_name(classifier, ids):
    trace = record_spikes(spiking(classifier), batch_of(ids))
    gates = {n for n in trace.spikes if "lora_gate" in n}
    assert set(trace.spikes) - gates == set(LIFS)
    assert gates == set(trace.values) == {
        f"blocks.{i}.{half}.{name}.lora_gate.default"
        for i in range(3) for half in ("att", "ffn") for name in ("key", "value", "receptance")
    }  # fmt: skip
    assert trace.spikes["blocks.1.lif2"].shape == (4, 9, 12) and trace.spikes["blocks.1.lif2"].dtype == np.int8


def test_lengths_labels_and_silence_behind_the_end(classifier, ids):
    trace = record_spikes(classifier, batch_of(ids))
    assert trace.lengths.tolist() == [9, 5, 1, 7] and trace.labels.tolist() == [1, 0, 0, 1]
    for spikes in trace.spikes.values():
        assert all((spikes[row, n:] == 0).all() for row, n in enumerate(trace.lengths))


def test_left_padded_batches_give_the_same_trace(classifier, ids):
    model, rows = spiking(classifier), batch_of(ids)
    left = batch_of(ids, "left")
    for row, n in enumerate((9, 5, 1, 7)):
        left["input_ids"][row, 9 - n :] = rows["input_ids"][row, :n]
    a, b = record_spikes(model, rows), record_spikes(model, left)
    assert a.tokens.tolist() == b.tokens.tolist()
    assert all((a.spikes[name] == b.spikes[name]).all() for name in a.spikes)
    assert all(np.allclose(a.values[name], b.values[name]) for name in a.values)


def test_a_gates_values_are_spike_times_activation(classifier, ids):
    model, seen = spiking(classifier), []
    name = "blocks.0.ffn.key.lora_gate.default"
    gate = model.get_submodule(f"base_model.model.spikegpt.{name}")
    handle = gate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    trace = record_spikes(model, {"input_ids": ids})
    handle.remove()
    a = seen[0].numpy()
    assert np.allclose(trace.values[name], a * (a >= 0.2), atol=1e-6)
    assert ((trace.values[name] != 0) == (trace.spikes[name] != 0)).all()


def test_rates_count_real_tokens_only(classifier, ids):
    trace = record_spikes(classifier, batch_of(ids))
    alone = [record_spikes(classifier, {"input_ids": ids[row : row + 1, :n]}) for row, n in enumerate((9, 5, 1, 7))]
    name = "blocks.1.lif1"
    spikes = sum(int(t.spikes[name].sum()) for t in alone)
    assert trace.firing_rate(name) == pytest.approx(spikes / (22 * 12))
    assert trace.sparsity(name) == pytest.approx(1 - spikes / (22 * 12))
    assert trace.spikes_per_token(name) == pytest.approx(spikes / 22)
    assert trace.spikes_per_token() == pytest.approx(sum(int(s.sum()) for t in alone for s in t.spikes.values()) / 22)


def test_dead_and_saturated_neurons_are_counted_over_real_tokens():
    spikes = np.zeros((2, 3, 4), np.int8)
    spikes[0, :2, 0] = spikes[1, :3, 0] = 1  # neuron 0 at every real token; sentence 0 has two
    spikes[:, :2, 1] = 1  # neuron 1 at all but one
    words = np.full((2, 3), "a")
    trace = SpikeTrace({"emb": spikes}, {}, np.array([2, 3]), words, words, np.array([-1, -1]))
    assert (trace.dead("emb"), trace.saturated("emb")) == (0.5, 0.25)


def test_a_rate_counts_spikes_and_spikes_a_token_add_up_their_sizes():
    spikes = np.zeros((1, 2, 4), np.int8)
    spikes[0, 0] = [-128, 0, 2, 1]
    words = np.full((1, 2), "a")
    trace = SpikeTrace({"emb": spikes}, {}, np.array([2]), words, words, np.array([-1]))
    assert (trace.firing_rate("emb"), trace.sparsity("emb")) == (3 / 8, 5 / 8)
    assert trace.spikes_per_token("emb") == trace.spikes_per_token() == 131 / 2


def test_tokens_and_words_stand_beside_the_spikes(classifier):
    tokenizer = train_tokenizer(["unhappy films don't end"] * 2, 37)
    tokenizer.padding_side = "left"
    batch = tokenizer(["Unhappy films", "end ."], padding=True, return_tensors="pt")
    trace = record_spikes(classifier, batch, tokenizer)
    for row, (text, words) in enumerate([("unhappy films", ["unhappy", "films"]), ("end .", ["end"])]):
        n = trace.lengths[row]
        assert "".join(trace.tokens[row, :n]).replace("▁", " ").split() == text.replace(".", "<unk>").split()
        assert list(dict.fromkeys(trace.words[row, :n]))[: len(words)] == words
        assert (trace.words[row, n:] == "").all()
    assert trace.labels.tolist() == [-1, -1]


def test_hooks_are_gone_and_the_mode_is_restored_also_after_an_exception(classifier, ids):
    classifier.train()
    with pytest.raises(ValueError, match="input_ids must be in"):
        record_spikes(classifier, {"input_ids": ids + 1000}, membranes=True)
    record_spikes(classifier, {"input_ids": ids})
    assert classifier.training
    assert not any(module._forward_hooks for module in classifier.modules())
    assert not any(getattr(module, "store_v_seq", False) for module in classifier.modules())


def test_a_saved_trace_comes_back(classifier, ids, tmp_path):
    trace = record_spikes(spiking(classifier), batch_of(ids), note="four sentences", currents=True, membranes=True)
    trace.save(tmp_path / "trace.npz")
    again = SpikeTrace.load(tmp_path / "trace.npz")
    for field in ("spikes", "values", "currents", "membranes"):
        a, b = getattr(trace, field), getattr(again, field)
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a)
    for field in ("lengths", "tokens", "words", "labels"):
        assert (getattr(trace, field) == getattr(again, field)).all()
    assert again.note == "four sentences"


@pytest.mark.parametrize("time, learn", [("pointwise", "none"), ("token", "none"), ("token", "both")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_recorded_membranes_explain_the_spikes_of_neurons_and_gates(classifier, ids, backend, time, learn, side):
    model, rows = spiking(classifier, spikelora_time=time, spikelora_learn=learn), batch_of(ids, side)
    trace = record_spikes(model, rows, currents=True, membranes=True)
    plain = record_spikes(model, rows)
    assert plain.membranes == {} and trace.membranes.keys() == trace.spikes.keys() - {"emb"}
    base = model.base_model.model.spikegpt
    for name, membranes in trace.membranes.items():
        gate = base.get_submodule(name)
        assert membranes.dtype == np.float32 and (trace.spikes[name] == plain.spikes[name]).all()
        earlier = np.concatenate([np.zeros_like(membranes[:, :1]), membranes[:, :-1]], axis=1)
        if getattr(gate, "time", "token") == "pointwise":
            earlier[:] = 0  # each token a first step from rest
        h = earlier + (trace.currents[name] - earlier) / 2.0
        threshold = float(torch.as_tensor(gate.threshold_now()).detach()) if "lora_gate" in name else 1.0
        real = np.arange(9)[None, :] < trace.lengths[:, None]
        sure = (np.abs(h - threshold) > 1e-5) & real[..., None]  # recorded in float32, run in float64
        assert ((h >= threshold) == (trace.spikes[name] != 0))[sure].all() and sure.sum() > 0.9 * real.sum() * 4
        assert np.allclose(membranes[real], (h * (trace.spikes[name] == 0))[real], atol=1e-5)
        assert (membranes[~real] == 0).all()


def test_recording_membranes_leaves_none_behind(classifier, ids):
    classifier.spikegpt.blocks[0].lif1.store_v_seq = True
    record_spikes(classifier, batch_of(ids), membranes=True)
    stored = [block.lif1.store_v_seq for block in classifier.spikegpt.blocks]
    assert stored == [True, False, False]
    assert not any(hasattr(block.lif1, "v") for block in classifier.spikegpt.blocks)


@pytest.mark.parametrize("time", ["pointwise", "token"])
def test_spikingjellys_monitor_sees_the_membranes_of_neurons_and_gates(classifier, ids, time):
    model = spiking(classifier, spikelora_time=time)
    with (
        monitor.AttributeMonitor("v", False, model, LIF),
        pytest.raises(AttributeError, match="set store_v_seq = True"),
    ):
        model(ids)
    for module in model.modules():
        if isinstance(module, LIF):
            module.store_v_seq = True
    with monitor.AttributeMonitor("v_seq", False, model, LIF) as seen:
        model(ids)
    assert len(seen.records) == 6 + 18  # two neurons and six gates a block
    assert all(v.shape in ((4, 9, 12), (4, 9, 4)) and v.abs().max() > 0 for v in seen.records)
    functional.reset_net(model)
    assert not any(hasattr(module, "v") for module in model.modules() if isinstance(module, LIF))


def test_a_model_that_stores_membranes_trains_with_gradient_checkpointing(classifier, ids):
    gradients = []
    for stored in (False, True):
        for block in classifier.spikegpt.blocks:
            block.lif1.store_v_seq = block.lif2.store_v_seq = stored
        classifier.train().gradient_checkpointing_enable()
        classifier.zero_grad()
        torch.manual_seed(0)  # of dropout
        classifier(ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in classifier.parameters()])
    assert all(map(torch.equal, *gradients))


def test_numpy_alone_reads_the_file(classifier, ids, tmp_path):
    record_spikes(classifier, batch_of(ids)).save(tmp_path / "trace.npz")
    code = "import sys; sys.modules['torch'] = sys.modules['spikegpt_lora'] = None; import numpy; "
    code += f"f = numpy.load({str(tmp_path / 'trace.npz')!r}); print(f['spikes/blocks.0.lif1'].shape, f['lengths'])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "(4, 9, 12) [9 5 1 7]"


def test_a_trace_saved_before_there_were_membranes_loads(classifier, ids, tmp_path):
    trace = record_spikes(classifier, batch_of(ids))
    arrays = {f"spikes/{name}": array for name, array in trace.spikes.items()}
    arrays |= {name: getattr(trace, name) for name in ("lengths", "tokens", "words", "labels", "note")}
    np.savez_compressed(tmp_path / "old.npz", **arrays)
    again = SpikeTrace.load(tmp_path / "old.npz")
    assert again.membranes == again.currents == {} and again.spikes.keys() == trace.spikes.keys()


def saved_with(classifier, ids, file, **arrays):
    """A trace whose file holds other `arrays` beside or instead of its own; bytes are written as they are."""
    record_spikes(classifier, {"input_ids": ids}).save(file)
    with np.load(file) as whole:
        own = {name: whole[name] for name in whole.files}
    np.savez_compressed(file, **own | {name: x for name, x in arrays.items() if isinstance(x, np.ndarray)})
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        for name in arrays.keys() - own.keys():
            if isinstance(arrays[name], bytes):
                archive.writestr(f"{name}.npy", arrays[name])


def header(shape, descr="|i1"):
    memory = io.BytesIO()
    np.lib.format.write_array_header_1_0(memory, {"descr": descr, "fortran_order": False, "shape": shape})
    return memory.getvalue()


FORGED_ARRAYS = {
    "a header that promises 4 TB": ({"spikes/x": header((1 << 42,))}, "says that it holds 4,398,046,511,104 bytes"),
    "a huge array of nothing": ({"spikes/x": np.zeros((4, 9, 1 << 14), np.int8)}, "its arrays take up .* most="),
    "pickled objects": ({"labels": np.array([{}] * 4, dtype=object)}, "labels holds pickled objects"),
    "a group of no trace": ({"weights/x": np.zeros((4, 9, 1))}, "weights/x is no array of a trace"),
    "other sentences": ({"spikes/x": np.zeros((3, 9, 2), np.int8)}, r"spikes/x of shape \(3, 9, 2\) does not fit"),
    "lengths beyond the end": ({"lengths": np.array([9, 9, 9, 10])}, r"lengths must be in \[0, 9\]"),
    "no array": ({"spikes/x": b"text"}, "no .npz file to be read"),
    "another version": ({"spikes/x": b"\x93NUMPY\x09\x00" + bytes(20)}, r"version \(9, 0\)"),
}


@pytest.mark.parametrize("name", FORGED_ARRAYS)
def test_a_forged_trace_is_refused_before_it_is_read(classifier, ids, tmp_path, name):
    arrays, message = FORGED_ARRAYS[name]
    saved_with(classifier, ids, tmp_path / "x.npz", **arrays)
    with pytest.raises(DamagedFile, match=f"x.npz is no spike trace written by SpikeTrace.save.*{message}"):
        SpikeTrace.load(tmp_path / "x.npz", most=1 << 18)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.ones(3)}, r"labels must be one for each of 4 sentences, got shape \(3,\)"),
        ({"labels": torch.tensor(1)}, r"labels must be one for each of 4 sentences, got shape \(\)"),
        ({"attention_mask": torch.zeros(4, 9)}, "at least one real token"),
        ({"input_ids": torch.zeros(0, 9).long()}, r"at least one real token, got tokens \(0, 9\)"),
        ({"input_ids": [[1, 2], [3, 4]]}, "input_ids .* must be a tensor, got list: .*return_tensors='pt'"),
        ({"input_ids": None}, "input_ids .* must be a tensor, got NoneType"),
    ],
)
def test_a_batch_that_cannot_be_recorded_is_refused_by_name(classifier, ids, change, message):
    with pytest.raises(ValueError, match=message):
        record_spikes(classifier, batch_of(ids) | change)


@pytest.mark.parametrize("batch, got", [(None, "NoneType"), ({"ids": 1}, "ids"), ({}, "nothing"), ([1], "list")])
def test_what_is_no_batch_is_refused_by_name(classifier, batch, got):
    with pytest.raises(ValueError, match=f"mapping with input_ids or inputs_embeds, got {got}"):
        record_spikes(classifier, batch)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "other arrays"])
def test_a_file_that_is_no_trace_is_refused(classifier, ids, tmp_path, damage):
    file = tmp_path / "x.npz"
    record_spikes(classifier, {"input_ids": ids}).save(file)
    whole = file.read_bytes()
    flipped = whole[:60] + bytes(byte ^ 255 for byte in whole[60:400]) + whole[400:]
    contents = {"empty": b"", "text": b"not a zip", "truncated": whole[: len(whole) // 2], "flipped": flipped}
    file.write_bytes(contents.get(damage, whole))
    if damage == "other arrays":
        np.savez(file, a=np.ones(3))
    with pytest.raises(ValueError, match="x.npz is no spike trace"):
        SpikeTrace.load(file)


def test_a_model_without_spikegpt_is_refused():
    with pytest.raises(ValueError, match="Linear holds no SpikeGPTModel"):
        record_spikes(torch.nn.Linear(2, 2), {"input_ids": torch.ones(1, 2)})


def adapter_activity(model, batches):
    with observe_adapters(model) as seen:
        for batch in batches:
            run(model, batch)
    return seen.activity()


def test_activity_agrees_with_the_recorded_gates(classifier, ids):
    model = spiking(classifier)
    batches = [{k: v[rows] for k, v in batch_of(ids).items()} for rows in (slice(0, 1), slice(1, 4))]
    activity = adapter_activity(model, batches)
    trace = record_spikes(model, batch_of(ids))
    fired = [spikes.sum((0, 1)) for name, spikes in trace.spikes.items() if "lora_gate" in name]
    fired = np.concatenate(fired)
    assert activity.sparsity == pytest.approx(1 - fired.mean() / 22)
    assert activity.dead_ranks == pytest.approx((fired == 0).mean())
    one = activity.modules["blocks.2.att.value"]
    assert one["sparsity"] == pytest.approx(trace.sparsity("blocks.2.att.value.lora_gate.default"))


def test_contribution_is_the_norm_of_what_the_adapter_adds(classifier, ids):
    torch.manual_seed(0)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=r".*blocks\.0\.att\.key"))
    layer = model.double().get_submodule("base_model.model.spikegpt.blocks.0.att.key")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    inputs = []
    handle = layer.register_forward_hook(lambda module, x, y: inputs.append(x[0]))
    activity = adapter_activity(model, [batch_of(ids)])
    handle.remove()
    x = inputs[0][batch_of(ids)["attention_mask"].bool()]
    expected = (x @ layer.get_delta_weight("default").T).norm() / (x @ layer.base_layer.weight.T).norm()
    assert abs(activity.contribution - expected) < 1e-9
    assert (activity.sparsity, activity.dead_ranks) == (None, None)


def test_special_tokens_are_words_of_their_own(classifier):
    tokenizer = train_tokenizer(["unhappy films"] * 2, 37)
    batch = tokenizer(["<eos> unhappy <eos>"], return_tensors="pt")
    words = record_spikes(classifier, batch, tokenizer).words[0]
    assert words[0] == words[-1] == "<eos>" and set(words[1:-1]) == {"unhappy"}


def test_activity_of_a_silent_base_has_no_contribution_and_no_batch_is_an_error(classifier, ids):
    torch.nn.init.zeros_(classifier.spikegpt.blocks[0].att.key.weight)
    model = get_peft_model(classifier, SpikeLoraConfig(task_type="SEQ_CLS", target_modules=r".*blocks\.0\.att\.key"))
    assert adapter_activity(model.double(), [batch_of(ids)]).contribution is None
    with pytest.raises(ValueError, match="at least one batch"):
        adapter_activity(model, [])


def test_a_model_without_adapters_has_no_activity(classifier, ids):
    assert adapter_activity(classifier, [batch_of(ids)]) is None


def test_a_shut_gate_is_seen_as_dead_and_lets_no_gradient_into_b(classifier, ids):
    config = SpikeLoraConfig(task_type="SEQ_CLS", r=4, spikelora_v_threshold=1e6)
    model = get_peft_model(classifier, config).double()
    activity = adapter_activity(model, [batch_of(ids)])
    assert (activity.sparsity, activity.dead_ranks, activity.contribution) == (1.0, 1.0, 0.0)
    model(ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all((p.grad == 0).all() for name, p in model.named_parameters() if "lora_B" in name)


def test_recording_changes_no_output(classifier, ids):
    before = classifier(ids).logits
    record_spikes(classifier, {"input_ids": ids})
    assert largest_difference(classifier(ids).logits, before) == 0

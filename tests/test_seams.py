"""What this package uses of other packages beyond what they document, in one list. When a version moves one of them,
its test says which and where we use it; what rests on it might only be wrong, in silence."""

import argparse
import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import accelerate
import peft
import pytest
import torch
import transformers
from helpers import SIZES
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Conv1d, Embedding, Linear, LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, PeftType, register_peft_method
from peft.utils import save_and_load as peft_files
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn
from transformers import (
    Cache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    initialization,
    trainer_callback,
    trainer_pt_utils,
)
from transformers.generation import utils as generation
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.pytorch_utils import Conv1D

import spikegpt_lora
from spikegpt_lora import SpikeGPTConfig, SpikeGPTModel, SpikeLoraConfig
from spikegpt_lora.adapters.config import KINDS
from spikegpt_lora.adapters.layer import FusedLinear, fused
from spikegpt_lora.ops.backend import untouched
from spikegpt_lora.utils.checks import kinds, violations
from spikegpt_lora.utils.inputs import CACHES


@dataclass
class Seam:
    """name: of what is used; used: where, in this repository; must: what has to hold; holds: whether it does."""

    name: str
    used: str
    must: str
    holds: Callable[[], bool]


def takes(function, *names) -> bool:
    """Whether the parameters begin with these, in this order."""
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]
    return parameters[: len(names)] == list(names)


def has(function, *names) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def says(thing, *texts) -> bool:
    """Whether these texts stand in the source of a function or class, one after the other."""
    source, at = inspect.getsource(thing), 0
    for text in texts:
        at = source.find(text, at)
        if at < 0:
            return False
    return True


def adapted(config) -> nn.Module:
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config(target_modules=["0"])).base_model.model[0]


def small() -> SpikeGPTModel:
    return SpikeGPTModel(SpikeGPTConfig(**SIZES))


def checkpointing() -> bool:
    model = small()
    model.gradient_checkpointing_enable()
    return all("_gradient_checkpointing_func" in block.__dict__ for block in model.blocks)


def respects_what_was_loaded() -> bool:
    loaded = nn.Parameter(torch.zeros(2))
    loaded._is_hf_initialized = True
    initialization.ones_(loaded)
    return not loaded.any() and all(callable(getattr(initialization, n)) for n in ("zeros_", "normal_", "copy_"))


def modules_to_save() -> bool:
    wrapper = ModulesToSaveWrapper(nn.Linear(2, 2), "default")
    wrapper.set_adapter("default")
    return isinstance(wrapper.modules_to_save["default"], nn.Linear) and (
        (wrapper.active_adapters, wrapper.disable_adapters) == (["default"], False)
        and isinstance(wrapper.original_module, nn.Linear)
    )


def quantised_layers() -> bool:
    text = Path(importlib.util.find_spec("peft.tuners.lora.bnb").origin).read_text(encoding="utf-8")
    return all(f"class {name}(torch.nn.Module, LoraLayer)" in text for name in ("Linear4bit", "Linear8bitLt"))


def a_hook_sees_keywords() -> bool:
    seen, module = [], nn.Identity()

    def hook(module, args, kwargs):
        seen.append(kwargs)

    module.register_forward_pre_hook(hook, with_kwargs=True)
    module(input=1)
    return seen == [{"input": 1}] and hook in module._forward_pre_hooks.values()


def hooks_are_seen() -> bool:
    """One kind of hook after the other, on a module of its own: an operator no longer does what the module does."""
    kinds = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    modules = [nn.Linear(2, 2) for _ in kinds]
    bare = all(untouched(module, nn.Linear) for module in modules)
    for module, kind in zip(modules, kinds, strict=True):
        getattr(module, f"register_{kind}")(lambda *given: None)
    return bare and not any(untouched(module, nn.Linear) for module in modules)


LAYER, MODEL, CONFIG = "adapters/layer.py", "adapters/model.py", "adapters/config.py"
CONVOLUTION, EMBEDDING = "adapters/convolution.py", "adapters/embedding.py"
OWN_MODEL, TRAINING = "model.py", "finetune/trainer.py"

SEAMS = [
    # peft: how a gate gets into a layer
    Seam("peft Linear.lora_variants", LAYER, "a property, a dict from tuples of field names to variants",
         lambda: isinstance(vars(Linear)["lora_variants"], property)
         and says(Linear.lora_variants.fget, '("use_dora",)')),
    Seam("peft LoraVariant", LAYER, "has these methods and no others, which a gate would have to answer too",
         lambda: {n for n in vars(LoraVariant) if not n.startswith("_")}
         == {"supports_lora_conversion", "init", "merge_safe", "merge_unsafe", "unmerge", "forward"}),
    Seam("peft LoraVariant.forward", LAYER, "(module, active_adapter, x, result, **kwargs)",
         lambda: takes(LoraVariant.forward, "module", "active_adapter", "x", "result")),
    Seam("peft LoraLayer.resolve_lora_variant", "adapters/quantized.py", "(*, config), asked once an adapter",
         lambda: has(LoraLayer.resolve_lora_variant, "config")
         and says(LoraLayer.update_layer, "resolve_lora_variant(config=config)", "lora_variant[adapter_name].init(")),
    Seam("peft field metadata is_lora_variant", CONFIG, "what a field of a configuration says to be a variant's switch",
         lambda: says(LoraLayer.resolve_lora_variant, 'metadata.get("is_lora_variant")')),
    Seam("peft BaseTunerLayer.adapter_layer_names", LAYER, "a tuple of the names of dicts by adapter",
         lambda: isinstance(BaseTunerLayer.adapter_layer_names, tuple) and "lora_A" in Linear.adapter_layer_names),
    Seam("peft LoraLayer.update_layer", LAYER, "(adapter_name, r, lora_alpha, ..., config)",
         lambda: takes(LoraLayer.update_layer, "adapter_name", "r", "lora_alpha")
         and has(LoraLayer.update_layer, "config")),
    Seam("peft Linear._mixed_batch_forward", LAYER, "(x, ..., *, adapter_names), for batches of several adapters",
         lambda: has(Linear._mixed_batch_forward, "x", "adapter_names")),
    Seam("peft Linear.get_delta_weight", LAYER, "(adapter)", lambda: takes(Linear.get_delta_weight, "adapter")),
    Seam("peft LoraLayer's attributes", f"{LAYER}, adapters/fingerprint.py, export/graph.py", "dicts by adapter name",
         lambda: all("default" in getattr(adapted(peft.LoraConfig), name)
                     for name in ("r", "scaling", "lora_A", "lora_B", "lora_dropout", "active_adapters"))
         and (adapted(peft.LoraConfig).merged, adapted(peft.LoraConfig).disable_adapters) == (False, False)),
    Seam("peft Conv1d (_ConvNd).update_layer", CONVOLUTION,
         "A a convolution to r channels, B one of size 1 with the groups; of the dilation and padding_mode of W0 A has "
         "neither (issue 3697): once it has, require_same_places need not refuse them",
         lambda: says(Conv1d.update_layer, "conv_layer(self.in_features, r, kernel_size, stride, padding, bias=False)",
                      "r, self.out_features, out_kernel, out_stride, groups=base_layer.groups, bias=lora_bias")),
    Seam("peft Conv1d.lora_variants, Embedding.lora_variants", LAYER, "as Linear's",
         lambda: all(says(vars(kind)["lora_variants"].fget, '("use_dora",)') for kind in (Conv1d, Embedding))),
    Seam("peft Embedding._embed, _get_embed_scale", EMBEDDING, "(tokens, table), A[x]; what W0's output is times",
         lambda: takes(Embedding._embed, "input", "weight") and takes(Embedding._get_embed_scale)),
    Seam("peft Embedding.update_layer", EMBEDDING, "lora_embedding_A (r, tokens), lora_embedding_B (outputs, r)",
         lambda: says(Embedding.update_layer, "torch.randn((r, self.in_features))",
                      "torch.randn((self.out_features, r))", "lora_variant[adapter_name].init(")),
    Seam("peft Embedding._mixed_batch_forward", EMBEDDING, "asks no variant, so that the gated rows are ours",
         lambda: has(Embedding._mixed_batch_forward, "x", "adapter_names")
         and "lora_variant" not in inspect.getsource(Embedding._mixed_batch_forward)),
    Seam("peft LoraConfig.target_modules_to_tie", MODEL, "the layers that share the embedding's adapter",
         lambda: says(LoraModel._create_and_replace, "target_name in (getattr(lora_config, \"target_modules_to_tie\"")),
    Seam("peft LoraConfig._register_custom_module", LAYER, "a layer's class for a type of linear, asked for first",
         lambda: type(adapted(lambda **kwargs: fused(peft.LoraConfig(**kwargs)))) is FusedLinear),
    Seam("peft.tuners.lora.bnb Linear4bit, Linear8bitLt", "adapters/quantized.py", "LoRA layers", quantised_layers),
    # peft: how a method becomes known, layers are replaced, files written and read
    Seam("peft PeftType: _name_, _value_, _member_names_, _member_map_, _value2member_map_", CONFIG,
         "an enumeration of strings that takes a member later",
         lambda: PeftType("SPIKELORA") is PeftType.SPIKELORA and "SPIKELORA" in PeftType.__members__
         and PeftType.SPIKELORA == "SPIKELORA" and {"_name_", "_value_"} <= set(vars(PeftType.LORA))
         and all(hasattr(PeftType, n) for n in ("_member_names_", "_member_map_", "_value2member_map_"))),
    Seam("peft register_peft_method", "adapters/__init__.py", "(name, config_cls, model_cls, prefix)",
         lambda: has(register_peft_method, "name", "config_cls", "model_cls", "prefix")),
    Seam("peft LoraModel.target_module_mapping", "adapters/__init__.py", "a dict from model types to targets",
         lambda: isinstance(LoraModel.target_module_mapping, dict) and "llama" in LoraModel.target_module_mapping),
    Seam("peft LoraConfig's annotations", f"{CONFIG}, utils/checks.py", "say a setting's type; KINDS where not",
         lambda: all(name in get_type_hints(peft.LoraConfig) for name in KINDS)
         and not violations(SpikeLoraConfig(), kinds(SpikeLoraConfig(), get_type_hints(SpikeLoraConfig) | KINDS))),
    Seam("peft PeftConfig.from_peft_type", CONFIG, "makes a configuration of what a file holds",
         lambda: says(peft.PeftConfig.from_pretrained, "from_json_file", "from_peft_type(**kwargs)")),
    Seam("peft BaseTuner._create_and_replace", MODEL, "(config, adapter_name, target, target_name, parent, ...)",
         lambda: takes(LoraModel._create_and_replace, "lora_config", "adapter_name", "target", "target_name", "parent",
                       "current_key")),
    Seam("peft LoraModel._create_new_module", MODEL, "static, (lora_config, adapter_name, target, ...)",
         lambda: isinstance(vars(LoraModel)["_create_new_module"], staticmethod)
         and takes(LoraModel._create_new_module, "lora_config", "adapter_name", "target")),
    Seam("peft BaseTuner._unload_and_optionally_merge", MODEL, "(merge, progressbar, safe_merge, adapter_names)",
         lambda: takes(LoraModel._unload_and_optionally_merge, "merge", "progressbar", "safe_merge", "adapter_names")
         and says(BaseTuner.merge_and_unload, "self._unload_and_optionally_merge(")),
    Seam("peft LoraModel.supports_lora_conversion, merge_adapter, add_weighted_adapter", MODEL, "these arguments",
         lambda: takes(LoraModel.supports_lora_conversion, "adapter_name")
         and takes(LoraModel.merge_adapter, "adapter_names", "safe_merge")
         and takes(LoraModel.add_weighted_adapter, "adapters")),
    Seam("peft BaseTuner._get_adapter_state_dict", MODEL, "asked for what is saved, before the configuration is",
         lambda: says(peft_files.get_peft_model_state_dict, "tuner_cls._get_adapter_state_dict(")
         and takes(LoraModel._get_adapter_state_dict, "model", "config", "adapter_name", "state_dict",
                   "unwanted_adapter_names")
         and says(peft.PeftModel.save_pretrained, "get_peft_model_state_dict(", "peft_config.save_pretrained(")),
    Seam("peft BaseTuner._remap_adapter_state_dict_for_load", MODEL, "asked on every way of loading",
         lambda: says(peft_files.set_peft_model_state_dict, "tuner_cls._remap_adapter_state_dict_for_load(")
         and takes(LoraModel._remap_adapter_state_dict_for_load, "model", "config", "adapter_name", "state_dict")
         and says(peft.PeftModel.load_adapter, "set_peft_model_state_dict(")
         and says(peft.PeftModel.from_pretrained, "model.load_adapter(")),
    Seam("peft ModulesToSaveWrapper", "export/graph.py", "modules_to_save by adapter name, original_module",
         modules_to_save),
    # transformers: generation carries the state as if it were a cache
    Seam("transformers ALL_CACHE_NAMES", "model.py, utils/inputs.py", "'state' among them; the first in inputs.CACHES",
         lambda: "state" in generation.ALL_CACHE_NAMES and generation.ALL_CACHE_NAMES[0] in CACHES),
    Seam("transformers GenerationMixin._update_model_kwargs_for_generation", OWN_MODEL, "(outputs, model_kwargs, ...)",
         lambda: takes(GenerationMixin._update_model_kwargs_for_generation, "outputs", "model_kwargs")
         and says(GenerationMixin._sample, "self._update_model_kwargs_for_generation(")),
    Seam("transformers GenerationMixin._expand_inputs_for_generation", OWN_MODEL,
         "(expand_size, is_encoder_decoder, input_ids, ...)",
         lambda: takes(
             GenerationMixin._expand_inputs_for_generation, "expand_size", "is_encoder_decoder", "input_ids")),
    Seam("transformers GenerationMixin.prepare_inputs_for_generation", OWN_MODEL, "is told is_first_iteration",
         lambda: has(GenerationMixin.prepare_inputs_for_generation, "is_first_iteration")
         and says(generation, "is_first_iteration=is_first_iteration")),
    Seam("transformers GenerationMixin._supports_default_dynamic_cache", OWN_MODEL, "asked before a cache is made",
         lambda: says(GenerationMixin._prepare_cache_for_generation, "self._supports_default_dynamic_cache()")),
    Seam("transformers _reorder_cache", OWN_MODEL, "asked by beam search for caches of other kinds",
         lambda: says(GenerationMixin._beam_search, "self._reorder_cache(")),
    Seam("transformers PreTrainedModel._is_stateful", OWN_MODEL, "keeps assisted generation from taking tokens back",
         lambda: PreTrainedModel._is_stateful is False and says(generation, "self._is_stateful")),
    # transformers: models, configurations, trainers
    Seam("transformers GradientCheckpointingLayer._gradient_checkpointing_func", "adapters/sequence.py",
         "an attribute of each layer that is checkpointed", checkpointing),
    Seam("transformers initialization and _is_hf_initialized", OWN_MODEL, "leave loaded weights alone",
         respects_what_was_loaded),
    Seam("transformers PreTrainedModel._init_weights", OWN_MODEL, "(module), asked for every module",
         lambda: takes(PreTrainedModel._init_weights, "module")
         and says(PreTrainedModel, "self._init_weights(module)")),
    Seam("transformers PreTrainedModel._no_split_modules, _tied_weights_keys", OWN_MODEL, "class attributes",
         lambda: all(hasattr(PreTrainedModel, name) for name in ("_no_split_modules", "_tied_weights_keys"))),
    Seam("transformers PreTrainedModel.loss_function", OWN_MODEL, "a property that knows the class's loss",
         lambda: isinstance(vars(PreTrainedModel)["loss_function"], property)),
    Seam("transformers PreTrainedModel.warn_if_padding_and_no_attention_mask", OWN_MODEL, "(input_ids, attention_mask)",
         lambda: takes(PreTrainedModel.warn_if_padding_and_no_attention_mask, "input_ids", "attention_mask")),
    Seam("transformers PretrainedConfig.__post_init__", "config.py", "gets the unknown keys, after attribute_map",
         lambda: "kwargs" in inspect.signature(PretrainedConfig.__post_init__).parameters
         and isinstance(PretrainedConfig.attribute_map, dict)),
    Seam("transformers PretrainedConfig.to_json_file", "config.py", "writes config.json wherever one is saved",
         lambda: takes(PretrainedConfig.to_json_file, "json_file_path", "use_diff")
         and says(PretrainedConfig.save_pretrained, "self.to_json_file(output_config_file, use_diff=True)")
         and says(PreTrainedModel.save_pretrained, "config.save_pretrained(save_directory)")),
    Seam("transformers register_for_auto_class", "config.py", "asked of a configuration that auto_map named",
         lambda: says(transformers.AutoConfig.from_pretrained, "config_class.register_for_auto_class()")),
    Seam("transformers Cache.get_seq_length", "adapters/sequence.py", "0 of an empty cache",
         lambda: transformers.DynamicCache().get_seq_length() == 0 and issubclass(transformers.DynamicCache, Cache)),
    Seam("transformers Conv1D", MODEL, "a transposed linear with .weight (inputs, outputs)",
         lambda: Conv1D(3, 2).weight.shape == (2, 3)),
    Seam("transformers DisentangledSelfAttention", MODEL, "its name and attributes, by which two calls are seen",
         lambda: says(DisentangledSelfAttention, "self.relative_attention =", "self.query_proj")
         and says(DisentangledSelfAttention, "self.share_att_key =")),
    Seam("transformers Trainer._get_train_sampler", TRAINING, "(train_dataset), gives the order of the sentences",
         lambda: takes(Trainer._get_train_sampler, "train_dataset") and says(Trainer, "self._get_train_sampler")),
    Seam("transformers Trainer.training_step", TRAINING, "(model, inputs, ...)",
         lambda: takes(Trainer.training_step, "model", "inputs")),
    Seam("transformers LengthGroupedSampler", TRAINING, "(batch_size, lengths=, generator=), draws from .generator",
         lambda: trainer_pt_utils.LengthGroupedSampler(
             2, lengths=[1, 2], generator=(g := torch.Generator())).generator is g),
    Seam("transformers ExportableState", TRAINING, "a callback's state(), saved and restored by Trainer",
         lambda: hasattr(trainer_callback.ExportableState, "state") and says(Trainer, "ExportableState")),
    Seam("transformers ProgressCallback, PrinterCallback", TRAINING, "training_bar, current_step",
         lambda: says(trainer_callback.ProgressCallback, "self.training_bar =", "self.current_step =")
         and hasattr(trainer_callback, "PrinterCallback")),
    Seam("accelerate PartialState", "recipes/subj_finetune.py", "knows the processes",
         lambda: accelerate.PartialState().num_processes >= 1),
    # spikingjelly: the neuron
    Seam("spikingjelly functional.lif_multi_step", "neurons/lif.py", "these nine, in this order",
         lambda: takes(functional.lif_multi_step, "x_seq", "v", "tau", "decay_input", "v_threshold", "v_reset",
                       "surrogate_function", "detach_reset", "store_v_seq")),
    Seam("spikingjelly surrogate.ATan", "neurons/lif.py, neurons/embedding.py, export/graph.py",
         "has alpha and spiking", lambda: (surrogate.ATan(1.5).alpha, surrogate.ATan(1.5).spiking) == (1.5, True)),
    Seam("spikingjelly neuron.LIFNode", "neurons/lif.py", "these settings, kept as attributes",
         lambda: all(hasattr(neuron.LIFNode(step_mode="m"), name) and has(neuron.LIFNode, name) for name in
                     ("tau", "decay_input", "v_threshold", "v_reset", "surrogate_function", "detach_reset"))),
    # torch and Python
    Seam("torch Module._forward_pre_hooks", "adapters/sequence.py", "holds hooks with keyword arguments",
         a_hook_sees_keywords),
    Seam("torch Module._forward_hooks, _forward_pre_hooks, _backward_hooks, _backward_pre_hooks", "ops/backend.py",
         "hold all the hooks on a module", hooks_are_seen),
    Seam("torch Module._modules, _parameters, _buffers", "ops/block_step.py, ops/backend.py", "what it holds, by name",
         lambda: (list((linear := nn.Linear(2, 2))._parameters), list(nn.Sequential(linear)._modules), linear._buffers)
         == (["weight", "bias"], ["0"], {})),
    Seam("torch Module._apply", "ops/spike_linear.py", "asked of every module that is moved or cast",
         lambda: says(nn.Module._apply, "for module in self.children():", "module._apply(fn")),
    Seam("torch Module._save_to_state_dict, _load_from_state_dict", "ops/packed_linear.py", "asked for every module",
         lambda: says(nn.Module.state_dict, "self._save_to_state_dict(")
         and says(nn.Module.load_state_dict, "module._load_from_state_dict(")),
    Seam("torch get_extra_state", "adapters/gate.py", "saved as _extra_state",
         lambda: "_extra_state" in spikegpt_lora.adapters.SpikeGate(2).state_dict()),
    Seam("torch._subclasses.FakeTensor", "utils/inputs.py", "tensors without values",
         lambda: isinstance(torch._subclasses.FakeTensor, type)),
    Seam("torch TorchDispatchMode (torch.utils._python_dispatch) and an operator's _schema", "utils/timing.py",
         "names the operators called", lambda: torch.ops.aten.mm.default._schema.name == "aten::mm"
         and callable(importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode)),
    Seam("argparse HelpFormatter._get_help_string", "utils/command_line.py", "(action), the help text",
         lambda: takes(argparse.HelpFormatter._get_help_string, "action")),
]  # fmt: skip


def moved(seam: Seam) -> str | None:
    """What to say of a seam that does not hold."""
    try:
        if seam.holds():
            return None
        why = "it does not hold"
    except Exception as error:  # whatever a moved name raises is the answer
        why = f"{type(error).__name__}: {error}"
    return f"{seam.name} has moved ({why}). It must be so: {seam.must}. We use it in {seam.used}"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_what_we_use_of_others_is_as_it_was(seam):
    assert moved(seam) is None


@pytest.mark.parametrize("holds", [lambda: False, lambda: nn.there_is_no_such_name])
def test_a_seam_that_moves_is_named_with_its_place(holds):
    assert moved(Seam("torch nn.x", "model.py", "there", holds)).startswith("torch nn.x has moved (")
    assert moved(Seam("torch nn.x", "model.py", "there", holds)).endswith("We use it in model.py")


PACKAGE = Path(spikegpt_lora.__file__).parent
FILES = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.joinpath("recipes").glob("*.py")]


def private(name) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def touched() -> set[str]:
    """Names with an underscore that our files take as attributes and define nowhere."""
    nodes = [node for file in FILES for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and private(node.attr)]
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    modules = {part for node in nodes if isinstance(node, ast.ImportFrom) for part in (node.module or "").split(".")}
    return {node.attr for node in attributes} - own | {name for name in modules if private(name)}


def overridden() -> set[str]:
    """Names with an underscore that our classes have in place of what a class of another package has."""
    found = set()
    for info in pkgutil.walk_packages(spikegpt_lora.__path__, "spikegpt_lora."):
        for cls in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(cls) and cls.__module__ == info.name:
                others = [base for base in cls.__mro__ if not base.__module__.startswith("spikegpt_lora")]
                found |= {n for n in vars(cls) if private(n) and any(n in vars(base) for base in others)}
    return found - {"_abc_impl"}


def test_every_private_name_that_we_touch_or_override_stands_in_the_list():
    listed = re.split(r"[^\w]+", " ".join(seam.name for seam in SEAMS))
    missing = {name for name in touched() | overridden() if name not in listed}
    assert not missing and {"_gradient_checkpointing_func", "_forward_pre_hooks"} <= touched()
    assert {"_init_weights", "_get_train_sampler"} <= overridden()


def test_every_seams_place_exists():
    for seam in SEAMS:
        for place in seam.used.split(", "):
            if place.endswith(".py"):
                assert (PACKAGE / place).is_file() or (PACKAGE.parent / place).is_file(), place

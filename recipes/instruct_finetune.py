"""Teach a language model to answer: instruction tuning with LoRA or SpikeLoRA on trl's SFTTrainer.

    pip install "spikegpt_lora[instruct]" && python recipes/instruct_finetune.py --data-path answers.jsonl
    python recipes/generate.py --model runs/instruct --chat --prompt "who made it?"

Rows of --data-path are conversations (messages), prompt and completion, instruction, input and output, or text; what is
learned is the answers, of text all of it. A conversation is rendered by the tokenizer's chat template, or, where it has
none, as "user: ...", a line feed, "assistant: ...", the end of text; the template is saved with the adapter. Stop it
whenever you like, with Ctrl-C or SIGTERM: it saves, and the same command goes on where it was.

It leaves in --output-dir the adapter with its tokenizer, for peft's from_pretrained and generate.py --model, a
README.md, and run.json: options, rows, loss on validation rows, share of silent gate outputs.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import datasets
import torch
from datasets import DatasetDict
from huggingface_hub import HfApi, constants
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from spikegpt_lora import SpikeGPTForCausalLM, SpikeLoraConfig
from spikegpt_lora.adapters import fused
from spikegpt_lora.adapters.config import PRESETS
from spikegpt_lora.adapters.gate import KINDS as GATES
from spikegpt_lora.checkpoint import load_causal_model
from spikegpt_lora.finetune.experiment import header
from spikegpt_lora.finetune.instruct import bf16_of, instruction_trainer, take_up, train, validation
from spikegpt_lora.finetune.run import seconds_of
from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.report.cards import instructed_card
from spikegpt_lora.tasks.instructions import PLAIN_TEMPLATE, load_instructions
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import first_line
from spikegpt_lora.utils.files import locked, whole_files, write_json, write_text
from spikegpt_lora.utils.hub import require_reachable
from spikegpt_lora.utils.precision import resolve

SCHEMA = "spikegpt_lora/instruct/1"
# What results do not depend on; of the data, their sha256 is compared.
ASIDE = ("data_path", "output_dir", "device", "precision", "eval_step", "save_step", "push_to_hub", "hub_model_id")
RATES = {True: 3e-3, False: 3e-4}  # by whether it is a SpikeGPT: small models bear more
TIMES = ("pointwise", "token")
GATE = ("spikelora_v_threshold", "spikelora_gate", "spikelora_time")
PACKED = "--packing puts several texts in a row, and {} carries {} from one to the next: leave it out"
STOPPED = "stopped; the same command goes on from here."


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it says of a damaged file, an error here says too
    require_possible(args)
    precision = resolve(args.precision, device_of(args.device), bf16_of(args.output_dir))
    data = load_instructions(args.data_path, args.val_set_size, args.seed)
    asked = {key: value for key, value in vars(args).items() if key not in ASIDE}
    with locked(args.output_dir):
        options = take_up(args.output_dir, asked | {"bf16": precision.bf16, "data_sha256": digest(data)})
        if not (args.output_dir / "run.json").is_file():
            print(precision)
            tune(args, options, data)
        shutil.rmtree(args.output_dir / "training", ignore_errors=True)
        if args.push_to_hub:
            HfApi().create_repo(args.hub_model_id, exist_ok=True)
            HfApi().upload_folder(repo_id=args.hub_model_id, folder_path=args.output_dir, ignore_patterns=[".lock*"])
    print(f"\n{(args.output_dir / 'README.md').read_text(encoding='utf-8')}\nThe adapter is in {args.output_dir}:")
    chat = " --chat" if conversations(data) else ""
    print(f'  python recipes/generate.py --model {args.output_dir}{chat} --prompt "..."')
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add, rate = parser.add_argument, command_line.number("> 0 and finite")
    add(
        "--base-model",
        default="embedded",
        help="embedded, the folder of a language model, or a hub id; any architecture",
    )
    add("--data-path", required=True, help="a .json, .jsonl, .csv or .parquet file, or a hub dataset's id")
    add("--output-dir", type=Path, default=Path("runs/instruct"), help="everything goes here")
    add("--val-set-size", type=share, default=0.1, help="rows held out: how many, or below 1 which share of all")
    add("--cutoff-len", type=command_line.positive, default=128, help="tokens a row; what is beyond is cut")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    command_line.add_precision(add)
    add("--hub-model-id", help="with --push-to-hub: where to")
    add("--push-to-hub", action="store_true", help="give the adapter to the hub when it is trained")
    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=command_line.positive, default=16, help="rows a step")
    add("--num-epochs", type=command_line.positive, default=3, help="of the rows")
    add("--learning-rate", type=rate, help="at its highest (default: 3e-3 of a SpikeGPT, 3e-4 of other models)")
    add("--packing", action="store_true", help="several texts a row, where a model keeps them apart")
    add("--eval-step", type=command_line.positive, default=50, help="steps from one validation to the next")
    add("--save-step", type=command_line.positive, default=50, help="steps from one checkpoint to the next")
    add("--seed", type=command_line.seed, default=0, help="of the split, initial values, order and dropout")
    add = parser.add_argument_group("adapter").add_argument
    add("--lora-r", type=command_line.positive, default=8, help="its rank")
    add("--lora-alpha", type=rate, default=16, help="what it adds is scaled by alpha / rank")
    add("--lora-dropout", type=command_line.number("in [0, 1)"), default=0.05, help="before A")
    add(
        "--lora-target-modules",
        nargs="+",
        metavar="NAME",
        help="names of linear layers, or all-linear (default: rkv+srffn of a SpikeGPT, all-linear of other models)",
    )
    add("--use-spikelora", action="store_true", help="gate what the adapters pass with spikes (default: stock LoRA)")
    threshold = command_line.number(">= 0 and finite")
    add("--spikelora-v-threshold", type=threshold, help="of the gate's membranes (default: 0.1)")
    add("--spikelora-gate", choices=list(GATES), help="what a spike passes (default: graded)")
    add("--spikelora-time", choices=TIMES, help="token: membranes leak along the text (default: pointwise)")
    add("--quantize", action="store_true", help="the base model in 4 bits (QLoRA, nf4), by bitsandbytes")
    return parser.parse_args()


def share(text: str) -> float:
    value = float(text)
    if not (0 <= value < 1 or (value.is_integer() and value > 0)):
        raise argparse.ArgumentTypeError(f"must be a whole number of rows, or a share below 1, got {text}")
    return value


def require_possible(args: argparse.Namespace) -> None:
    """Raise ValueError, or ConnectionError, for what is seen to fail before anything is read."""
    for wanted, package, extra in ((True, "trl", "instruct"), (args.quantize, "bitsandbytes", "qlora")):
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f'this needs {package}, which is not installed: pip install "spikegpt_lora[{extra}]"')
    if not args.use_spikelora and (given := gate_of(args)):
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} is a setting of the gate: give --use-spikelora too")
    if args.packing and args.spikelora_time == "token":
        raise ValueError(PACKED.format("--spikelora-time token", "membranes"))
    if args.push_to_hub != (args.hub_model_id is not None):
        raise ValueError("--push-to-hub and --hub-model-id belong together: give both, or none")
    if args.push_to_hub:
        try:
            require_reachable(constants.ENDPOINT)
            HfApi().whoami()
        except OSError as error:
            raise ConnectionError(
                f"--push-to-hub: the hub takes nothing from here ({first_line(error)}): leave it out"
            ) from error


def device_of(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch sees, found none: give --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def digest(data: DatasetDict) -> str:
    return hashlib.sha256(json.dumps({name: rows.to_list() for name, rows in data.items()}).encode()).hexdigest()


def conversations(data: DatasetDict) -> bool:
    return isinstance(data["train"][0].get("prompt"), list)


def load_base(
    args: argparse.Namespace, device: torch.device, bf16: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    settings = {}
    if args.quantize:
        compute = torch.bfloat16 if bf16 else torch.float32
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        settings = {"quantization_config": nf4, "device_map": {"": str(device)}}
    model, tokenizer = load_causal_model(args.base_model, **settings)
    own = isinstance(model, SpikeGPTForCausalLM)
    if own and args.quantize and model.config.matrix_spikes == "integer":
        raise ValueError(
            f"--quantize is for matrices that read real numbers, and those of {args.base_model} read integer spikes "
            "(matrix_spikes 'integer'): leave it out"
        )
    if own and args.packing:
        raise ValueError(PACKED.format("a SpikeGPT", "its state"))
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {args.base_model} must have an end of text (eos_token): answers end with it"
        )
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return model, tokenizer


def gate_of(args: argparse.Namespace) -> dict:
    """The settings of the gate that are given; of the others `SpikeLoraConfig` knows the defaults."""
    return {name: value for name in GATE if (value := getattr(args, name)) is not None}


def adapter_of(args: argparse.Namespace, own: bool) -> LoraConfig:
    names = args.lora_target_modules or ["rkv+srffn" if own else "all-linear"]
    whole = len(names) == 1 and names[0] in (*PRESETS, "all-linear")
    shared = {"target_modules": PRESETS.get(names[0], names[0]) if whole else names, "task_type": "CAUSAL_LM"}
    shared |= {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    if args.use_spikelora:
        return SpikeLoraConfig(**shared, **gate_of(args))
    return LoraConfig(**shared) if args.quantize else fused(LoraConfig(**shared))


def tune(args: argparse.Namespace, options: dict, data: DatasetDict) -> None:
    """Train, measure, and write the adapter, its card and, last, run.json."""
    device, bf16 = device_of(args.device), options["bf16"]
    model, tokenizer = load_base(args, device, bf16)
    use_extension("auto", device)  # built now: no log line breaks the bar
    own, cuda = isinstance(model, SpikeGPTForCausalLM), device.type == "cuda"
    trainer = instruction_trainer(
        model, tokenizer, data, adapter_of(args, own), "SpikeLoRA" if args.use_spikelora else "LoRA",
        output_dir=str(args.output_dir / "training"), num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate or RATES[own], lr_scheduler_type="linear", warmup_steps=0.06,
        max_length=args.cutoff_len, packing=args.packing, gradient_checkpointing=args.quantize,
        eval_steps=args.eval_step, save_steps=args.save_step, bf16=bf16, use_cpu=not cuda,
        dataloader_pin_memory=cuda, seed=args.seed, data_seed=args.seed,
    )  # fmt: skip
    rows = rows_read(args, data, trainer)
    train(trainer)
    parameters = list(trainer.model.parameters())
    options = options | {"learning_rate": trainer.args.learning_rate}
    record = header(SCHEMA, args.data_path, args.base_model, bf16, options) | {
        "complete": True,
        "rows": rows,
        "steps": trainer.state.global_step,
        "seconds": seconds_of(trainer),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        **validation(trainer),
        "log": trainer.state.log_history,
    }
    with whole_files(args.output_dir, last="run.json") as temporary:
        trainer.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", instructed_card(record))
        write_json(temporary / "run.json", record)


def rows_read(args: argparse.Namespace, data: DatasetDict, trainer: Trainer) -> dict[str, int]:
    """How many rows each split has, and how many are left out; says so where some are."""
    if args.packing:  # trl cuts the text into rows anew, and leaves out none
        return {name: len(rows) for name, rows in data.items()}
    held = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    rows, cut = {name: len(held[name]) for name in data}, f"--cutoff-len {args.cutoff_len} cuts off the whole answer"
    if empty := [name for name, number in rows.items() if not number]:
        raise ValueError(f"{cut} of every {empty[0]} row: give a larger one")
    if left := sum(map(len, data.values())) - sum(rows.values()):
        print(f"rows left out, because {cut}: {left:,}")
    return rows | {"left out": left}


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))

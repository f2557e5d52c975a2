"""Write text with a SpikeGPT language model, or with an adapter on any language model, on the CPU, a token at a time.

    spikegpt_lora generate embedded --prompt "this film"

A SpikeGPT reads the prompt once and carries its state on, so each further token costs the same, however long the text.
"""

import argparse
import sys
import time

from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer, set_seed

from ..checkpoint import load_with_adapter
from ..convert.generation import WEIGHTS, pack_weights
from ..utils import command_line


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_arguments(arguments, prog)
    command_line.set_up()
    model, tokenizer = load_with_adapter(args.model)
    if args.weights != "float32":
        pack_weights(model, args.weights)
    prompt = asked(tokenizer, args.prompt, args.chat)
    if prompt["input_ids"].shape[1] == 0:
        prompt = tokenizer(tokenizer.eos_token, return_tensors="pt")  # what stands before a text's first word
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    started = time.perf_counter()
    ids = model.generate(
        **prompt,
        max_new_tokens=args.max_new_tokens,
        streamer=FromTheStart(tokenizer, skip_prompt=args.chat, skip_special_tokens=True),
        **sampling if args.temperature else {"do_sample": False},
    )
    made = ids.shape[1] - prompt["input_ids"].shape[1]
    print(f"[{made} tokens, {made / (time.perf_counter() - started):.0f} a second]", file=sys.stderr)
    return 0


def asked(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> BatchEncoding:
    """The tokens of `text`; with `chat`, of a conversation that begins with it, up to where its answer would stand.

    Raises:
        ValueError: `chat`, and the tokenizer has no chat template.
    """
    if not chat:
        return tokenizer(text, return_tensors="pt")
    if not tokenizer.chat_template:
        raise ValueError(
            "--chat needs a tokenizer with a chat template, as instruct_finetune.py saves one: leave it out"
        )
    question = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)


class FromTheStart(TextStreamer):
    """Writes text as it comes, without the space that decoding puts before its first word."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        super().on_finalized_text(text if self.begun else text.lstrip(" "), stream_end)
        self.begun = self.begun or bool(text.strip())


def parse_arguments(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, prog)
    add = parser.add_argument
    add("model", nargs="?", help="embedded (the default), the folder of a saved language model or adapter, or a hub id")
    add("--model", dest="named", metavar="MODEL", help="the same")
    add(
        "--weights",
        default="float32",
        choices=["float32", *WEIGHTS],
        help="how matrices are held: fewer bytes are read faster",
    )
    add("--prompt", default="this film is", type=command_line.utf8, help="the text begins with it")
    add("--chat", action="store_true", help="the prompt is a question: it is asked as the model's chat template asks")
    add("--max-new-tokens", default=100, type=command_line.positive, help="it ends there, or where the text ends")
    add(
        "--temperature",
        default=0.8,
        type=command_line.number(">= 0 and finite"),
        help="below 1 safer, above 1 wilder; 0 takes the likeliest token each time",
    )
    add(
        "--top-p",
        default=0.9,
        type=command_line.number("in (0, 1]"),
        help="only the likeliest tokens that together have this probability",
    )
    add("--seed", default=0, type=command_line.seed, help="the same seed writes the same text")
    args = parser.parse_intermixed_args(arguments)  # options may stand before MODEL
    if args.model and args.named:
        parser.error(f"one model writes, got {args.model} and {args.named}: leave out one of them")
    args.model = args.model or args.named or "embedded"
    return args

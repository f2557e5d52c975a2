"""Write text with a SpikeGPT language model on the CPU, a token at a time.

The model reads the prompt once and carries its state on, so each further token costs the same, however long the text.
"""

import argparse
import logging
import sys
import time

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from spikegpt_lora import embedded_checkpoint


def main() -> int:
    args = parse_arguments()
    logging.basicConfig(format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return write(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130


def write(args) -> int:
    tokenizer, model = load(embedded_checkpoint() if args.model == "embedded" else args.model)
    prompt = tokenizer(args.prompt, return_tensors="pt")
    if prompt["input_ids"].shape[1] == 0:
        prompt = tokenizer(tokenizer.eos_token, return_tensors="pt")  # what stands before a text's first word
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    started = time.perf_counter()
    ids = model.generate(
        **prompt,
        max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling if args.temperature else {"do_sample": False},
    )
    made = ids.shape[1] - prompt["input_ids"].shape[1]
    print(f"[{made} tokens, {made / (time.perf_counter() - started):.0f} a second]", file=sys.stderr)
    return 0


def load(source: str):
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"no language model at {source!r}: {error}") from error
    if info["missing_keys"]:
        raise ValueError(f"{source} is no language model: it has no {', '.join(sorted(info['missing_keys']))}")
    return tokenizer, model.eval()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name, help, default, **kwargs):
        parser.add_argument(name, default=default, help=f"{help} (default: %(default)s)", **kwargs)

    add("--model", "embedded, the folder of a saved language model, or a hub id", "embedded")
    add("--prompt", "the text begins with it", "this film is")
    add("--max-new-tokens", "it ends there, or where the model ends the text", 100, type=int)
    add("--temperature", "below 1 safer, above 1 wilder; 0 takes the likeliest token each time", 0.8, type=float)
    add("--top-p", "only the likeliest tokens that together have this probability", 0.9, type=float)
    add("--seed", "the same seed writes the same text", 0, type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

"""Write text with a SpikeGPT language model, a token at a time, on whatever processor there is.

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
    source = embedded_checkpoint() if args.model == "embedded" else args.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source).eval()
    except (OSError, ValueError) as error:
        print(f"error: no language model at {args.model!r}: {error}", file=sys.stderr)
        return 2
    prompt = tokenizer(args.prompt, return_tensors="pt")
    if prompt["input_ids"].shape[1] == 0:
        prompt = tokenizer(tokenizer.eos_token, return_tensors="pt")  # what stands before a text's first word
    set_seed(args.seed)
    started = time.perf_counter()
    try:
        ids = model.generate(
            **prompt,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.temperature > 0,
            temperature=args.temperature or None,
            top_p=args.top_p,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )
    except KeyboardInterrupt:
        print()
        return 130
    made = ids.shape[1] - prompt["input_ids"].shape[1]
    print(f"[{made} tokens, {made / (time.perf_counter() - started):.0f} a second]", file=sys.stderr)
    return 0


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

"""Use what was trained: sentences classified, text written, spikes and their cost counted, bundles exported.

    spikegpt_lora classify runs/subj/spikelora/seed0 "a small gem ."
    spikegpt_lora generate --prompt "this film"
    spikegpt_lora cost runs/subj/spikelora/seed0
    spikegpt_lora export runs/subj/spikelora/seed0
    spikegpt_lora report runs/subj

`spikegpt_lora COMMAND --help` says more; `python -m spikegpt_lora` is the same. What is trained is trained by recipes:
`python -m spikegpt_lora.recipes.subj_finetune --help`.
"""

import sys
from importlib import import_module

from .utils import command_line

COMMANDS = {  # a module each, with `main(arguments, prog)`
    "classify": ".commands.classify",
    "generate": ".commands.generate",
    "cost": ".commands.cost",
    "export": ".commands.export",
    "report": ".report.__main__",
}


def main() -> int:
    parser = command_line.parser(__doc__, "spikegpt_lora")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    command = parser.parse_args(sys.argv[1:2]).command
    module = import_module(COMMANDS[command], __package__)
    stopped = getattr(module, "STOPPED", "stopped")
    return command_line.run(lambda: module.main(sys.argv[2:], f"spikegpt_lora {command}"), stopped)


if __name__ == "__main__":
    sys.exit(main())

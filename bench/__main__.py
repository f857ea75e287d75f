"""``python -m bench``, or with ``models``, ``accuracy`` or ``memory``: how fast and exact normops is, beside torch.

``python -m bench experiments`` shows what the layers do to training, ``python -m bench report`` makes one page of
recorded runs.
"""

import importlib
import sys

COMMANDS = {
    "models": "bench.models.command",
    "accuracy": "bench.exactness",
    "memory": "bench.memory",
    "experiments": "bench.experiments.command",
    "report": "bench.page.command",
}


def main(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    module = importlib.import_module(COMMANDS.get(name, "bench.layers"))
    return module.main(argv[1:] if name in COMMANDS else argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""``python -m bench``, or with ``models``, ``accuracy`` or ``memory``: how fast and exact normops is, beside torch."""

import sys


def main(argv: list[str]) -> int:
    if argv[:1] == ["models"]:
        from bench.models.command import main as command

        return command(argv[1:])
    if argv[:1] == ["accuracy"]:
        from bench.exactness import main as command

        return command(argv[1:])
    if argv[:1] == ["memory"]:
        from bench.memory import main as command

        return command(argv[1:])
    from bench.layers import main as command

    return command(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

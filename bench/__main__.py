"""``python -m bench`` and ``python -m bench models``: how fast and how exact normops is, beside torch."""

import sys


def main(argv: list[str]) -> int:
    if argv[:1] == ["models"]:
        from bench.models.command import main as command

        return command(argv[1:])
    from bench.layers import main as command

    return command(argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What the tests of the models found."""

# Differences are relative, errors those of the gradient against float64. Of the times, the last is torch's once more,
# after `accelerate`.
HEADER = (
    *("model", "converted", "left", "output", "gradient", "10 steps", "error: torch", "normops", "accelerated"),
    *("step: torch", "normops", "accelerated", "torch"),
)
TABLE = []


def lines():
    widths = [max(len(row[i]) for row in (HEADER, *TABLE)) for i in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (HEADER, *TABLE)]

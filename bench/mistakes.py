"""What torch has wrong, by name, each with the three lines that show it: they print an error that ought to be small."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF

import normops
from normops import functional as F

PREAMBLE = """\
import torch
import torch.nn.functional as F  # or normops.functional
from torch.autograd import grad
"""


@dataclass(frozen=True)
class Mistake:
    name: str
    lines: str  # of Python, behind the preamble

    def error(self, library: Any = TF) -> float:
        """What the lines print."""
        torch.manual_seed(0)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(PREAMBLE + f"F = {library.__name__}\n" + self.lines, {"normops": normops})
        return float(printed.getvalue())

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "lines": self.lines, "torch": self.error(), "normops": self.error(F)}


MISTAKES = [
    Mistake(
        "BatchNorm's gradient of (N, C, L, 1) that came by transposing is of other elements, if dy is contiguous",
        """\
x, dy = torch.randn(4, 50, 6, 1).transpose(1, 2).requires_grad_(), torch.randn(4, 6, 50, 1)
dx, right = (grad(F.batch_norm(a, None, None, training=True), x, dy)[0] for a in (x, x.contiguous()))
print(((dx - right).norm() / right.norm()).item())
""",
    ),
    Mistake(
        "GroupNorm of channels_last data far from zero has no digit right: mean 1e4, deviation 1",
        """\
x = (torch.randn(4, 32, 16, 16) + 1e4).contiguous(memory_format=torch.channels_last)
y, right = F.group_norm(x, 4), F.group_norm(x.double(), 4)
print(((y - right).abs().max() / right.abs().max()).item())
""",
    ),
    Mistake(
        "GroupNorm's gradient of such data in float16 is not finite",
        """\
x, dy = (torch.randn(4, 16, 16, 32).add(mean).half().movedim(-1, 1).requires_grad_() for mean in (1e4, 0))
dx, right = (grad(F.group_norm(a, 4), x, dy.to(a))[0].double() for a in (x, x.double()))
print(((dx - right).norm() / right.norm()).item())
""",
    ),
    Mistake(
        "BatchNorm of one number throughout, in channels_last, is not zero",
        """\
x = torch.full((4, 32, 16, 16), 1000.1).contiguous(memory_format=torch.channels_last)
y = F.batch_norm(x, None, None, training=True)
print(y.abs().max().item())
""",
    ),
    Mistake(
        "GroupNorm of one large number throughout is not zero",
        """\
x = torch.full((4, 32, 16, 16), 1e10)
y = F.group_norm(x, 4, torch.full((32,), 1.1))
print(y.abs().max().item())
""",
    ),
    Mistake(
        "LayerNorm keeps two digits of float32 data far from zero: mean 1e6, deviation 1",
        """\
x = torch.randn(64, 512) + 1e6
y, right = F.layer_norm(x, (512,)), F.layer_norm(x.double(), (512,))
print(((y - right).abs().max() / right.abs().max()).item())
""",
    ),
    Mistake(
        "BatchNorm of two million rows in float32 has no digit right: mean 1e4, deviation 1",
        """\
x = torch.randn(2**21, 1) + 1e4
y, right = (F.batch_norm(a, None, None, training=True) for a in (x, x.double()))
print(((y - right).abs().max() / right.abs().max()).item())
""",
    ),
    Mistake(
        "LayerNorm of numbers whose squares float32 does not have is not finite",
        """\
x = 1e20 * torch.randn(64, 512)
y, right = F.layer_norm(x, (512,)), F.layer_norm(x.double(), (512,))
print(((y - right).abs().max() / right.abs().max()).item())
""",
    ),
    Mistake(
        "RMSNorm of such numbers is zero, and so is BatchNorm",
        """\
x = 1e20 * torch.randn(64, 512)
y, right = F.rms_norm(x, (512,)), F.rms_norm(x.double(), (512,))
print(((y - right).abs().max() / right.abs().max()).item())
""",
    ),
    Mistake(
        "LayerNorm's bias gradient in bfloat16 stops growing with the number of rows",
        """\
x, bias = torch.randn(10**6, 16).bfloat16(), torch.zeros(16).bfloat16().requires_grad_()
(db,) = grad(F.layer_norm(x, (16,), None, bias), bias, torch.ones_like(x))
print((db / 10**6 - 1).abs().max().item())
""",
    ),
]

"""A model compiled ahead of time, for Python or C++ programs that have torch alone:
python examples/aot_inductor.py model.pt2"""

import sys

import torch
from torch import nn

import normops

path = sys.argv[1] if len(sys.argv) > 1 else "model.pt2"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4)).eval()
normops.convert(model)

x = torch.ones(3, 16)
batch = torch.export.Dim("batch", min=2, max=1024)
# Decomposed, the program holds torch's operations only: what loads it need not know normops.
with torch.no_grad(), normops.set_compile_mode("decompose"):
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=path)

output = torch._inductor.aoti_load_package(path)(x)
torch.testing.assert_close(output, model(x))
print(f"{path}: {output[0].tolist()}")

"""The devices that the tests run on."""

import torch
from emulator import backend

from normops._ops import BUILD_INFO

DEVICES = ["cpu"]
if backend.exists():
    DEVICES.append("emulated")
if BUILD_INFO["cuda"] and torch.cuda.is_available():
    DEVICES.append("cuda")

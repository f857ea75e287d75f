"""Prints what g++ needs to know of the installed torch."""

import torch
from torch.utils import cpp_extension

folders = [f"-I{folder}" for folder in cpp_extension.include_paths()]
libraries = [f"-L{folder} -Wl,-rpath,{folder}" for folder in cpp_extension.library_paths()]
abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
print(*folders, abi, *libraries, "-ltorch -ltorch_cpu -lc10")

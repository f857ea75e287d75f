"""Runs the CUDA kernels on the CPU: ``emulator.h`` is what they include, ``backend`` puts them behind the operators."""

"""Triton kernels for CUDA devices, each beside a slow twin; under `TRITON_INTERPRET=1` they run on a CPU, for tests."""

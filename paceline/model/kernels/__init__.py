"""Triton kernels for CUDA devices; under `TRITON_INTERPRET=1` they run on a CPU, for tests."""

"""Attention on a GPU: Triton kernels, each beside a slow torch twin that says what it computes."""

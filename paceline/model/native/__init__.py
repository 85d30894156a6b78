"""The forward of a decoder as one call of native code on a CPU, compiled by Numba for the machine at hand.

Every row (token) goes through the same operations in the same order, whatever else is in the batch, however rows are
grouped and whichever thread does it: its logits are the same bits alone, in any batch and in any draft tree.
"""

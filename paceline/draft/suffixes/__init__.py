"""Suffix structures and drafting from them, compiled by Numba. `draft/suffix.py` is the drafter."""

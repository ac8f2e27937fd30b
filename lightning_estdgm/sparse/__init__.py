"""Sparse compute: products on the active blocks of a weight, and the choice of what computes them."""

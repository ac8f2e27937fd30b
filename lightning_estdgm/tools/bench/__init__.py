"""Experiments that anyone can rerun: the demo, and the learning-rate sweep behind its rates."""

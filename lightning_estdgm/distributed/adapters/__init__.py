"""Adapters of the strategies that spread a model over ranks: their protocol, and one adapter a module."""

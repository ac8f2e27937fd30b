"""Backends of the products on active blocks: `_protocol`, and one backend a module."""

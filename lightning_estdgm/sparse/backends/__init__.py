"""Backends of the products on active blocks: `protocol`, and one backend a module."""

"""The strategies that spread a model over ranks: `_protocol`, and one adapter a module."""

"""The strategies that spread a model over ranks: `protocol`, and one adapter a module."""

"""Forms that a trained model can be exported to: `_protocol`, and one target a module."""

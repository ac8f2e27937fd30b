"""Energy sources: `_protocol`, and one source a module."""

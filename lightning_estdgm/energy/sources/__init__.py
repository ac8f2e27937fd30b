"""Energy sources: `protocol`, and one source a module."""

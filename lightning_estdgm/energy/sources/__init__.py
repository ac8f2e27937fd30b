"""Where energy is read: `protocol`, and one source a module."""

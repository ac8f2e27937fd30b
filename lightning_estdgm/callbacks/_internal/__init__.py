"""What only the callbacks use."""

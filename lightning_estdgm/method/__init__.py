"""The method's mathematics: tensors in, tensors out; no state, no Lightning."""

"""The run of the method on one model: state, steps and mask updates; no Lightning."""

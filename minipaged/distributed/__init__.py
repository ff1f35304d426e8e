"""Tensor parallelism (section 4.6): one scheduler, k ranks with a part of the model each."""

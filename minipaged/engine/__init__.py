"""The loop: plan a step, run the model, draw tokens, hand out text."""

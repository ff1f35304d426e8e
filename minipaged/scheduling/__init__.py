"""Which sequences compute which tokens in the next step, and who has to wait for it."""

"""Pictures of blocks and steps, for the terminal, the page and the notebook."""

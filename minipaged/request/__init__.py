"""What is asked: sampling parameters, sequences and sequence groups."""

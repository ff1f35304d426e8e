"""Decoders, and how they get from files into memory."""

"""Who owns which block of the KV cache.  Nothing here but `kv_cache.py` imports torch."""

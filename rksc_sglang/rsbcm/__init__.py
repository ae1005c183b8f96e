"""RSBCM: which KV of the radix tree is evicted first."""

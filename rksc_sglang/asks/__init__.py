"""ASKS, attention-similarity KV sharing: who may share whose KV, and when it is computed."""

"""Pure torch tensor code: imports nothing of SGLang, runs on a bare torch machine."""

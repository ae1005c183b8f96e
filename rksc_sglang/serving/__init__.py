"""RKSC inside SGLang's server processes: scheduler, tokenizer manager, HTTP routes, metrics."""

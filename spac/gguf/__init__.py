"""Model files: reading and checking GGUF headers, near or by HTTP, and writing models to try things on.

Nothing here loads a model or knows of memory limits.
"""

"""Pages of cached state: who holds which, and what may be shared."""

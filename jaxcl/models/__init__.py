"""Models: an architecture is a spec and four functions over a flat dict of parameters."""

"""The CPU path: verl's platform plug-in, an unsharded model, and kernels that save time or memory there."""

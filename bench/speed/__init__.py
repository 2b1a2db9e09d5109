"""Speed and memory, and what the compiled kernels tell."""

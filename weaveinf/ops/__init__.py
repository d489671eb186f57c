"""Pure tensor functions: a torch reference beside its fast kernels, chosen by device; no state."""

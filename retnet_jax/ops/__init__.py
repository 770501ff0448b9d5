"""Functions of arrays, some with kernels or gradients of their own."""

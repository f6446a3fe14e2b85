"""Compiles the GPU kernels without a GPU and reports what came out."""

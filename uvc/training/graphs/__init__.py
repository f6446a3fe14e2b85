"""A step of training as a CUDA graph: launched at once, instead of kernel by kernel from Python."""

from uvc.training.graphs.captured import Captured, CudaGraph

__all__ = ["Captured", "CudaGraph"]

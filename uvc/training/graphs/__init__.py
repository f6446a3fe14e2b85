"""A step of training as a CUDA graph: launched at once, instead of kernel by kernel from Python."""

from uvc.training.graphs.captured import Captured, CudaGraph
from uvc.training.graphs.update import CapturedUpdate

__all__ = ["Captured", "CapturedUpdate", "CudaGraph"]

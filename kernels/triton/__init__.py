"""The Triton provider, one file per op; imported only when a CUDA tensor or a request asks for it.

Triton multiplies nothing that the vendor's GEMM multiplies as well: kept weights are packed in one launch,
the projections are `torch.addmm`, and Triton does the rest (attention core, activations, scores, shrinkage).
Under `TRITON_INTERPRET=1`, set before the first use, the same kernels run on CPU tensors, on request only.
"""

// All but the backward pass of attention as one unit for nvcc, which takes longer for the headers than for the kernels.
#include "cuda/attention.cu"
#include "cuda/bias_gradient.cu"
#include "cuda/small.cu"

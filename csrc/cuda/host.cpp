// The host build of the small kernels; those of attention take long to compile and have files of their own.
#include "cuda/small.cu"

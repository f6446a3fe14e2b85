// The small kernels as one unit: most of the time that each would take to compile is that of the headers.
#include "cuda/activate.cu"
#include "cuda/gather.cu"
#include "cuda/group_scores.cu"
#include "cuda/prox_shrink.cu"

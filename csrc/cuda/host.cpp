// The host build of the small kernels; those of attention, which take longest to compile, have files of their own.
#include "cuda/activate.cu"
#include "cuda/gather.cu"
#include "cuda/group_scores.cu"
#include "cuda/prox_shrink.cu"

// The small kernels as one unit.
#include "cuda/activate.cu"
#include "cuda/column_sums.cu"
#include "cuda/gather.cu"
#include "cuda/group_scores.cu"
#include "cuda/prox_shrink.cu"
#include "cuda/turn.cu"

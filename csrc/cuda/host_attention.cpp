// The host build of the attention core, forward.
#include "cuda/attention.cu"

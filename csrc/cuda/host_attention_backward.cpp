// The host build of the attention core, backward.
#include "cuda/attention_backward.cu"

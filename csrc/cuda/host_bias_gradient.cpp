// The host build of the gradient of a bias of the scores.
#include "cuda/bias_gradient.cu"

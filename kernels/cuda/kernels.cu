// Everything in one module, so that all functions can be had at once.
#include "activations.cu"
#include "attention.cu"
#include "embed.cu"
#include "ffn_sparse.cu"
#include "norm.cu"
#include "rope.cu"
#include "rows.cu"
#include "sample.cu"

// Activations of several tokens, as tensor cores read them.
#pragma once
#include "mma.cuh"

// Columns that a row of a batch is padded to, with zeros.
constexpr u32 BATCH_COLUMNS = 64;

struct Batch {
    // [n_tokens, stride] f16: values times a power of two that makes the token's largest lie in 2^14 ... 2^15
    u16* high;
    // likewise: what rounding to f16 has left; null in 8-bit arithmetic
    u16* low;
    // [n_tokens] f32: one over the power of two
    float* unscale;
    u32 n_tokens, n_cols, stride, unused;
};
static_assert(sizeof(Batch) == 40, "as the launcher has it");

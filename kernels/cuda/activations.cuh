// How activations are written: a block of 32 values by one warp, one value a lane, or by eight lanes, four values each. The bits are the
// same. As `activations.rs` of the CPU has it.
#pragma once
#include "common.cuh"

__device__ __forceinline__ void store_block(const Act& to, u32 block, float value) {
    const u32 lane = threadIdx.x % WARP;
    to.values[block * BLOCK + lane] = value;
    if (to.quads != nullptr) ((float*)(to.quads + lane / 4 * to.n_blocks + block))[lane % 4] = value;
    if (to.halves == nullptr) return;
    float amax = warp_max(fabsf(value));
    // false for NaN too, which fmaxf leaves out
    bool finite = __all_sync(ALL_LANES, fabsf(value) < infinity());
    float scale = finite ? __fdiv_rn(amax, 127.0f) : not_a_number();
    float inverse = scale > 0.0f ? __fdiv_rn(127.0f, amax) : 0.0f;
    if (!(inverse < infinity())) inverse = 0.0f;
    int q = finite ? __float2int_rn(__fmul_rn(value, inverse)) : 0;
    to.halves[(lane / 16 * to.n_blocks + block) * 16 + lane % 16] = (u8)q;
    int sum = q;
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    int second = __shfl_sync(ALL_LANES, sum, 16);
    if (lane == 0) to.meta[block] = make_int4(__float_as_int(scale), sum, second, 0);
}

// A block's scale and this lane's four 8-bit values, the first in the lowest byte; zeros where there is no 8-bit arithmetic.
struct Rounded {
    float scale;
    u32 q;
};

// Values `column` ... `column` + 3, a multiple of 4, those of neighbouring lanes behind them. Called by whole warps; what lies behind the
// last block is not stored.
__device__ __forceinline__ Rounded store_quad(const Act& to, u32 column, float4 value) {
    const u32 block = column / BLOCK, quad = column % BLOCK / 4;
    const bool stores = block < to.n_blocks;
    if (stores) *(float4*)(to.values + column) = value;
    if (stores && to.quads != nullptr) to.quads[quad * to.n_blocks + block] = value;
    if (to.halves == nullptr) return Rounded{0.0f, 0};
    const float values[4] = {value.x, value.y, value.z, value.w};
    // as integers absolute values are in the same order, and NaN is the largest
    u32 most = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) most = max(most, __float_as_uint(values[k]) & 0x7FFFFFFF);
#pragma unroll
    for (int step = 1; step < 8; step *= 2) most = max(most, __shfl_xor_sync(ALL_LANES, most, step));
    const float amax = __uint_as_float(most);
    const bool finite = amax < infinity();
    const float scale = finite ? __fdiv_rn(amax, 127.0f) : not_a_number();
    float inverse = scale > 0.0f ? __fdiv_rn(127.0f, amax) : 0.0f;
    if (!(inverse < infinity())) inverse = 0.0f;
    u32 q = 0;
    int sum = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int of = finite ? __float2int_rn(__fmul_rn(values[k], inverse)) : 0;
        q |= (u32)(u8)of << 8 * k;
        sum += of;
    }
    if (stores) *(u32*)(to.halves + (quad / 4 * to.n_blocks + block) * 16 + quad % 4 * 4) = q;
    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    const int second = __shfl_xor_sync(ALL_LANES, sum, 4);
    if (stores && quad == 0) to.meta[block] = make_int4(__float_as_int(scale), sum, second, 0);
    return Rounded{scale, q};
}

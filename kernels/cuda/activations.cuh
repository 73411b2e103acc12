// How activations are written: by one warp a block of 32 values, one value a lane. As `activations.rs` of the CPU has it.
#pragma once
#include "common.cuh"

// A block's scale and this lane's 8-bit value; zeros where there is no 8-bit arithmetic.
struct Rounded {
    float scale;
    int q;
};

__device__ __forceinline__ Rounded store_block(const Act& to, u32 block, float value) {
    const u32 lane = threadIdx.x % WARP;
    to.values[block * BLOCK + lane] = value;
    if (to.quads != nullptr) ((float*)(to.quads + lane / 4 * to.n_blocks + block))[lane % 4] = value;
    if (to.halves == nullptr) return Rounded{0.0f, 0};
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
    return Rounded{scale, q};
}

// A norm in two halves, without a launch of its own: who writes the values makes activations of them times the norm's weight, and sums
// their squares; who multiplies by these activations takes the scale.
#pragma once
#include "activations.cuh"
#include "mma.cuh"

// The first half.
struct ThenNorm {
    // [n_cols] f32
    const float* weight;
    // value * weight; n_cols is a multiple of BLOCK
    Act to;
    // [n_blocks] f32, sums of squares of values; null: there is no norm behind
    float* squares;
    // values without the weight, and the same sums; none where `values` is null
    Act plain;
    float* plain_squares;
    // in host memory, or null: becomes `part` where it is zero and the sum of all squares may not be finite
    u32* not_finite;
    u32 part;
};
static_assert(sizeof(ThenNorm) == 120, "as the launcher has it");

// Of a block of values, one a lane. Called by whole warps.
__device__ __forceinline__ void then_norm(const ThenNorm& then, u32 block, float value, float weight) {
    store_block(then.to, block, __fmul_rn(value, weight));
    if (then.plain.values != nullptr) store_block(then.plain, block, value);
    const float square = warp_sum(__fmul_rn(value, value));
    if (threadIdx.x % WARP != 0) return;
    then.squares[block] = square;
    if (then.plain.values != nullptr) then.plain_squares[block] = square;
    if (then.not_finite != nullptr && !(square * (float)then.to.n_blocks < infinity())) {
        volatile u32* note = then.not_finite;
        if (*note == 0) *note = then.part;
    }
}

// The second half.
struct NormBefore {
    // as `ThenNorm` has them, with zeros behind them up to a multiple of 4, aligned to 16 bytes; null: activations are what they are
    const float* squares;
    float eps;
};
static_assert(sizeof(NormBefore) == 16, "as the launcher has it");

// Most blocks of activations that a norm's scale is taken of.
constexpr u32 NORM_BLOCKS = 256;

// What products with `x` are multiplied by: sums of squares are asked for when this is made, and needed when the scale is. Every lane reads
// what it has asked for itself. The same bits in every warp. Called by whole warps, with memory of their own.
struct NormScale {
    const NormBefore& norm;
    const Act& x;
    float (&squares)[NORM_BLOCKS];

    __device__ __forceinline__ NormScale(const NormBefore& norm, const Act& x, float (&squares)[NORM_BLOCKS])
        : norm(norm), x(x), squares(squares) {
        if (norm.squares == nullptr) return;
#pragma unroll 1
        for (u32 at = threadIdx.x % WARP * 4; at < x.n_blocks; at += 4 * WARP) copy16(squares + at, norm.squares + at);
        end_copies();
    }

    __device__ __forceinline__ float scale() const {
        if (norm.squares == nullptr) return 1.0f;
        copies_landed<0>();
        float sum = 0.0f;
#pragma unroll 1
        for (u32 at = threadIdx.x % WARP * 4; at < x.n_blocks; at += 4 * WARP) {
            const float4 four = *(const float4*)(squares + at);
            sum += (four.x + four.y) + (four.z + four.w);
        }
        const float mean = __fdiv_rn(warp_sum(sum), (float)x.n_cols);
        return __fdiv_rn(1.0f, __fsqrt_rn(mean + norm.eps));
    }
};

// Activations of several tokens: of values, of a norm, of gates and ups. One block a token.
#include "batch.cuh"

constexpr u32 BATCH_THREADS = 512;

// The largest `value` of the block's threads; every thread gets it.
__device__ __forceinline__ float block_max(float value) {
    __shared__ float largest[BATCH_THREADS / WARP];
    value = warp_max(value);
    if (threadIdx.x % WARP == 0) largest[threadIdx.x / WARP] = value;
    __syncthreads();
    return warp_max(largest[threadIdx.x % (BATCH_THREADS / WARP)]);
}

// Writes one token; `value(i)` gives column i, and is called twice by the same thread.
template <class Value>
__device__ __forceinline__ void store_token(const Batch& to, u32 token, Value value) {
    float amax = 0.0f;
    bool is_finite = true;
#pragma unroll 4
    for (u32 i = 2 * threadIdx.x; i < to.n_cols; i += 2 * BATCH_THREADS) {
        float first = fabsf(value(i)), second = i + 1 < to.n_cols ? fabsf(value(i + 1)) : 0.0f;
        amax = fmaxf(amax, fmaxf(first, second));
        // false for NaN too, which fmaxf leaves out
        is_finite = is_finite && first < infinity() && second < infinity();
    }
    is_finite = __syncthreads_and(is_finite);
    amax = block_max(amax);
    // exponents of normal numbers, so that both powers are; a token that is not finite stays so
    const int exponent = min(max((int)(__float_as_uint(amax) >> 23) - 127, -100), 100);
    const bool scaled = is_finite && amax > 0.0f;
    const float scale = scaled ? __uint_as_float((u32)(127 + 14 - exponent) << 23) : 1.0f;
    const u64 row = (u64)token * to.stride;
#pragma unroll 4
    for (u32 i = 2 * threadIdx.x; i < to.stride; i += 2 * BATCH_THREADS) {
        float first = i < to.n_cols ? value(i) * scale : 0.0f;
        float second = i + 1 < to.n_cols ? value(i + 1) * scale : 0.0f;
        u32 high = to_halves(first, second);
        *(u32*)(to.high + row + i) = high;
        if (to.low != nullptr) *(u32*)(to.low + row + i) = rest_halves(first, second, high);
    }
    if (threadIdx.x == 0) to.unscale[token] = scaled ? __uint_as_float((u32)(127 - 14 + exponent) << 23) : 1.0f;
    start_next_launch();
}

struct PrepareBatchArgs {
    // [n_tokens, n_cols] f32
    const float* x;
    Batch to;
};
static_assert(sizeof(PrepareBatchArgs) == 48, "as the launcher has it");

extern "C" __global__ void __launch_bounds__(BATCH_THREADS) prepare_batch(PrepareBatchArgs args) {
    wait_for_launch_before();
    const float* x = args.x + (u64)blockIdx.x * args.to.n_cols;
    store_token(args.to, blockIdx.x, [=](u32 i) { return x[i]; });
}

struct RmsNormBatchArgs {
    // [n_tokens, n_cols] f32
    const float* x;
    // [n_cols] f32
    const float* weight;
    // [n_tokens, n_cols] f32 or null: the normed values
    float* values;
    Batch to;
    float eps;
};
static_assert(sizeof(RmsNormBatchArgs) == 72, "as the launcher has it");

// Thread t adds squares t, t + 512, ... in ascending order; then lanes and warps are joined.
extern "C" __global__ void __launch_bounds__(BATCH_THREADS) rms_norm_batch(RmsNormBatchArgs args) {
    __shared__ float sums[BATCH_THREADS / WARP];
    const u32 n = args.to.n_cols, lane = threadIdx.x % WARP;
    const u64 row = (u64)blockIdx.x * n;
    wait_for_launch_before();
    const float *x = args.x + row, *weight = args.weight;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 i = threadIdx.x; i < n; i += BATCH_THREADS) sum = fmaf(x[i], x[i], sum);
    sum = warp_sum(sum);
    if (lane == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    float mean = __fdiv_rn(warp_sum(lane < BATCH_THREADS / WARP ? sums[lane] : 0.0f), (float)n);
    const float scale = __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
    auto value = [=](u32 i) { return __fmul_rn(__fmul_rn(x[i], scale), weight[i]); };
    if (args.values != nullptr)
#pragma unroll 4
        for (u32 i = threadIdx.x; i < n; i += BATCH_THREADS) args.values[row + i] = value(i);
    store_token(args.to, blockIdx.x, value);
}

struct GateUpBatchArgs {
    // [n_tokens, n_cols] f32 each: products of gate and of up rows
    const float* gate;
    const float* up;
    Batch to;
    // 0: SiLU, 1: ReLU, 3: GELU, as `rows.cu` numbers them
    u32 gates;
};
static_assert(sizeof(GateUpBatchArgs) == 64, "as the launcher has it");

extern "C" __global__ void __launch_bounds__(BATCH_THREADS) gate_up_batch(GateUpBatchArgs args) {
    wait_for_launch_before();
    const u64 row = (u64)blockIdx.x * args.to.n_cols;
    const float *gate = args.gate + row, *up = args.up + row;
    if (args.gates == 1)
        // a gate that is NaN is open
        store_token(args.to, blockIdx.x, [=](u32 i) { return gate[i] <= 0.0f ? 0.0f : gate[i] * up[i]; });
    else if (args.gates == 3)
        store_token(args.to, blockIdx.x, [=](u32 i) { return gelu(gate[i]) * up[i]; });
    else
        store_token(args.to, blockIdx.x, [=](u32 i) { return silu(gate[i]) * up[i]; });
}

#include "activations.cuh"
#include "hand_off.cuh"

struct RmsNormArgs {
    // [n_cols] f32
    const float* x;
    // [n_cols] f32
    const float* weight;
    // x is multiplied by 1 / sqrt(mean of squares + eps) and by weight, and becomes activations
    Act to;
    // the same without the weight; none where `values` is null
    Act plain;
    // where the normed values go in the host's memory, [n_cols] f32; nowhere where null
    float* host;
    HandOver hand;
    float eps;
};
static_assert(sizeof(RmsNormArgs) == 144, "as the launcher has it");

// Blocks of 1024 threads: each sums all squares, in the same order, and writes every gridDim.x-th run of 32 activation blocks.
// Thread t adds squares t, t + 1024, ... in ascending order; then lanes and warps are joined.
extern "C" __global__ void __launch_bounds__(1024) rms_norm(RmsNormArgs args) {
    __shared__ float sums[WARP];
    const u32 n = args.to.n_cols, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    wait_for_launch_before();
    float sum = 0.0f;
#pragma unroll 8
    for (u32 i = threadIdx.x; i < n; i += 1024) {
        float x = args.x[i];
        sum = fmaf(x, x, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    float mean = __fdiv_rn(warp_sum(sums[lane]), (float)n);
    float scale = __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
#pragma unroll 1
    for (u32 block = blockIdx.x * WARP + warp; block < args.to.n_blocks; block += gridDim.x * WARP) {
        u32 column = block * BLOCK + lane;
        float x = column < n ? args.x[column] : 0.0f;
        float normed = __fmul_rn(x, scale);
        float value = column < n ? __fmul_rn(normed, args.weight[column]) : 0.0f;
        if (args.host != nullptr && column < n) args.host[column] = value;
        store_block(args.to, block, value);
        if (args.plain.values != nullptr) store_block(args.plain, block, normed);
    }
    start_next_launch();
    if (args.host != nullptr) set_flag(args.hand, nullptr, 0);
}

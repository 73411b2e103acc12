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
    // where the normed values go in the host's memory, [n_cols] f32, or [n_blocks * 32] i8 and [n_blocks] f32, the scales, behind
    // them; nowhere where null
    float* host;
    HandOver hand;
    // [1] in host memory, or null: when all that comes before was there
    u64* begun;
    // in host memory, or null: becomes `part` where it is zero and the mean of squares is not finite
    u32* not_finite;
    u32 part;
    float eps;
    u32 host_q8;
};
static_assert(sizeof(RmsNormArgs) == 168, "as the launcher has it");

// Values that a thread asks for before it uses the first. (The rest of a loop that is merely unrolled waits for each.)
constexpr u32 NORM_TOGETHER = 8;

// Blocks of 1024 threads: each sums all squares, in the same order, and writes every gridDim.x-th run of 32 activation blocks.
// Thread t adds squares t, t + 1024, ... in ascending order; then lanes and warps are joined.
extern "C" __global__ void __launch_bounds__(1024) rms_norm(RmsNormArgs args) {
    __shared__ float sums[WARP];
    const u32 n = args.to.n_cols, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 own = (blockIdx.x * WARP + warp) * BLOCK + lane;
    const float own_weight = own < n ? __ldg(args.weight + own) : 0.0f;
    wait_for_launch_before();
    start_next_launch();
    if (args.begun != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *args.begun = time_ns();
    const float own_x = own < n ? args.x[own] : 0.0f;
    float sum = 0.0f;
#pragma unroll 1
    for (u32 first = threadIdx.x; first < n; first += NORM_TOGETHER * 1024) {
        float x[NORM_TOGETHER];
#pragma unroll
        for (u32 k = 0; k < NORM_TOGETHER; k++) x[k] = first + k * 1024 < n ? args.x[first + k * 1024] : 0.0f;
#pragma unroll
        for (u32 k = 0; k < NORM_TOGETHER; k++) sum = fmaf(x[k], x[k], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    float mean = __fdiv_rn(warp_sum(sums[lane]), (float)n);
    float scale = __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
    if (args.not_finite != nullptr && !(mean < infinity()) && blockIdx.x == 0 && threadIdx.x == 0) {
        volatile u32* note = args.not_finite;
        if (*note == 0) *note = args.part;
    }
#pragma unroll 1
    for (u32 block = blockIdx.x * WARP + warp; block < args.to.n_blocks; block += gridDim.x * WARP) {
        const u32 column = block * BLOCK + lane;
        const bool first = column == own;
        const float x = first ? own_x : column < n ? args.x[column] : 0.0f;
        const float weight = first ? own_weight : column < n ? args.weight[column] : 0.0f;
        const float normed = __fmul_rn(x, scale);
        const float value = __fmul_rn(normed, weight);
        const Rounded rounded = store_block(args.to, block, value);
        if (args.host != nullptr && args.host_q8) {
            ((i8*)args.host)[column] = (i8)rounded.q;
            if (lane == 0) args.host[args.to.n_blocks * (BLOCK / 4) + block] = rounded.scale;
        } else if (args.host != nullptr && column < n) {
            args.host[column] = value;
        }
        if (args.plain.values != nullptr) store_block(args.plain, block, normed);
    }
    if (args.host != nullptr) set_flag(args.hand, nullptr, 0);
}

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

// Threads of a block, which has a column of each NORM_COLUMNS.
constexpr u32 NORM_THREADS = 256, NORM_COLUMNS = 4 * NORM_THREADS;
// Quads that a thread asks for before it uses the first. (The rest of a loop that is merely unrolled waits for each.)
constexpr u32 NORM_TOGETHER = 8;

// Columns `column` ... `column` + 3, zeros behind the last one. `wide`: `from` is aligned to 16 bytes.
__device__ __forceinline__ float4 load_quad(const float* from, u32 column, u32 n, bool wide) {
    if (wide && column + 4 <= n) return *(const float4*)(from + column);
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (column < n) v.x = from[column];
    if (column + 1 < n) v.y = from[column + 1];
    if (column + 2 < n) v.z = from[column + 2];
    if (column + 3 < n) v.w = from[column + 3];
    return v;
}

// Each block sums all squares, in the same order, and writes every gridDim.x-th NORM_COLUMNS columns, of which there are no more.
// Thread t adds squares of columns 4 t ... 4 t + 3, then of those NORM_COLUMNS behind them; then lanes are joined, and warps in ascending order.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) rms_norm(RmsNormArgs args) {
    constexpr u32 WARPS = NORM_THREADS / WARP;
    __shared__ float sums[WARPS];
    const u32 n = args.to.n_cols, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 column = blockIdx.x * NORM_COLUMNS + threadIdx.x * 4;
    const bool wide = ((u64)args.x | (u64)args.weight) % 16 == 0;
    const float4 weight = load_quad(args.weight, column, n, wide);
    wait_for_launch_before();
    start_next_launch();
    if (args.begun != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *args.begun = time_ns();
    const float4 own = load_quad(args.x, column, n, wide);
    float sum = 0.0f;
#pragma unroll 1
    for (u32 first = threadIdx.x * 4; first < n; first += NORM_TOGETHER * NORM_COLUMNS) {
        float4 x[NORM_TOGETHER];
#pragma unroll
        for (u32 k = 0; k < NORM_TOGETHER; k++) x[k] = load_quad(args.x, first + k * NORM_COLUMNS, n, wide);
#pragma unroll
        for (u32 k = 0; k < NORM_TOGETHER; k++) {
            sum = fmaf(x[k].x, x[k].x, sum);
            sum = fmaf(x[k].y, x[k].y, sum);
            sum = fmaf(x[k].z, x[k].z, sum);
            sum = fmaf(x[k].w, x[k].w, sum);
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) sum += sums[w];
    const float mean = __fdiv_rn(sum, (float)n), scale = __fdiv_rn(1.0f, __fsqrt_rn(mean + args.eps));
    if (args.not_finite != nullptr && !(mean < infinity()) && blockIdx.x == 0 && threadIdx.x == 0) {
        volatile u32* note = args.not_finite;
        if (*note == 0) *note = args.part;
    }
    const float4 normed = make_float4(__fmul_rn(own.x, scale), __fmul_rn(own.y, scale), __fmul_rn(own.z, scale), __fmul_rn(own.w, scale));
    const float4 value = make_float4(__fmul_rn(normed.x, weight.x), __fmul_rn(normed.y, weight.y), __fmul_rn(normed.z, weight.z),
                                     __fmul_rn(normed.w, weight.w));
    const Rounded rounded = store_quad(args.to, column, value);
    if (args.plain.values != nullptr) store_quad(args.plain, column, normed);
    if (args.host == nullptr) return;
    if (args.host_q8) {
        if (column < args.to.n_blocks * BLOCK) ((u32*)args.host)[column / 4] = rounded.q;
        if (column % BLOCK == 0 && column < n) args.host[args.to.n_blocks * (BLOCK / 4) + column / BLOCK] = rounded.scale;
    } else {
        const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (u32 k = 0; k < 4; k++)
            if (column + k < n) args.host[column + k] = values[k];
    }
    set_flag(args.hand, nullptr, 0);
}

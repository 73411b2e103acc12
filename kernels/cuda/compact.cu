// Which neurons are active, as a list in ascending order; and how many were.
#include "common.cuh"

struct CompactArgs {
    // [n] f32
    const float* values;
    // [n] f32 or null
    const float* thresholds;
    u32 n, first_id;
    // [n] u32: first_id + index
    u32* ids;
    // [n] f32 or null: the values of the list
    float* kept;
    // how many there are
    u32* count;
};
static_assert(sizeof(CompactArgs) == 48, "as the launcher has it");

constexpr u32 COMPACT_THREADS = 1024;
// Values that a thread asks for before it uses the first.
constexpr u32 COMPACT_TOGETHER = 8;

// Above zero, or larger than its threshold whatever its sign; NaN always is.
__device__ __forceinline__ bool is_active(const CompactArgs& args, u32 i) {
    float value = args.values[i];
    return args.thresholds == nullptr ? !(value <= 0.0f) : !(fabsf(value) <= args.thresholds[i]);
}

__device__ __forceinline__ u32 block_sum(u32 count, u32* counts) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    count = (u32)warp_sum((int)count);
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    return (u32)warp_sum((int)counts[lane]);
}

// One value a thread. A block counts what lies before its own values itself, so that no block waits for another.
extern "C" __global__ void __launch_bounds__(COMPACT_THREADS) compact(CompactArgs args) {
    __shared__ u32 counts_before[COMPACT_THREADS / WARP], counts[COMPACT_THREADS / WARP];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, i = blockIdx.x * COMPACT_THREADS + threadIdx.x;
    wait_for_launch_before();
    u32 before = 0;
#pragma unroll 1
    for (u32 first = 0; first < blockIdx.x; first += COMPACT_TOGETHER) {
        bool are[COMPACT_TOGETHER];
#pragma unroll
        for (u32 k = 0; k < COMPACT_TOGETHER; k++)
            are[k] = first + k < blockIdx.x && is_active(args, (first + k) * COMPACT_THREADS + threadIdx.x);
#pragma unroll
        for (u32 k = 0; k < COMPACT_TOGETHER; k++) before += are[k];
    }
    before = block_sum(before, counts_before);
    const bool active = i < args.n && is_active(args, i);
    const u32 of_warp = __ballot_sync(ALL_LANES, active);
    if (lane == 0) counts[warp] = __popc(of_warp);
    __syncthreads();
    // of warps before this one, and of all
    u32 of_lane = counts[lane], total = (u32)warp_sum((int)of_lane);
    u32 at = before + (u32)warp_sum((int)(lane < warp ? of_lane : 0)) + __popc(of_warp & ((1u << lane) - 1));
    start_next_launch();
    if (active) {
        args.ids[at] = args.first_id + i;
        if (args.kept != nullptr) args.kept[at] = args.values[i];
    }
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) *args.count = before + total;
}

struct CountActiveArgs {
    // [n] f32: of all neurons, or of those of the list
    const float* act;
    // [1], or null: all
    const u32* count;
    // [2] in host memory: how many there are, and of these how many are not zero
    u32* counts;
    u32 n;
};
static_assert(sizeof(CountActiveArgs) == 32, "as the launcher has it");

// One block. What computes activations does not count them itself: registers for that cost it 3 to 6 percent.
extern "C" __global__ void __launch_bounds__(COMPACT_THREADS) count_active(CountActiveArgs args) {
    __shared__ u32 counts[COMPACT_THREADS / WARP];
    wait_for_launch_before();
    const u32 n = args.count == nullptr ? args.n : min(*args.count, args.n);
    u32 active = 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < n; i += COMPACT_THREADS) active += args.act[i] != 0.0f;
    active = block_sum(active, counts);
    start_next_launch();
    if (threadIdx.x == 0) {
        args.counts[0] = n;
        args.counts[1] = active;
    }
}

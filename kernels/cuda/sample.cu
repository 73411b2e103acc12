// The largest logits. A logit and its id are one key: larger values first, lower ids first among equal ones, NaN never.
#include "common.cuh"

// 0 is no key.
__device__ __forceinline__ u64 key_of(float value, u32 id) {
    // -0 is 0
    u32 bits = __float_as_uint(value + 0.0f);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return value == value ? (u64)bits << 32 | (u32)~id : 0;
}

__device__ __forceinline__ u32 id_of(u64 key) { return ~(u32)key; }

__device__ __forceinline__ float value_of(u64 key) {
    u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits & 0x80000000u ? bits ^ 0x80000000u : ~bits);
}

struct ArgmaxArgs {
    // [n] f32
    const float* logits;
    u32 n;
    // the id; 0xFFFFFFFF where there is nothing but NaN
    u32* id;
    // [gridDim.x]
    u64* partials;
    // one, zero
    u32* ticket;
};
static_assert(sizeof(ArgmaxArgs) == 40, "as the launcher has it");

__device__ __forceinline__ u64 block_max(u64 key) {
    __shared__ u64 keys[WARP];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, step));
    __syncthreads();
    if (lane == 0) keys[warp] = key;
    __syncthreads();
    key = lane < blockDim.x / WARP ? keys[lane] : 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) key = max(key, __shfl_xor_sync(ALL_LANES, key, step));
    return key;
}

extern "C" __global__ void __launch_bounds__(256) argmax(ArgmaxArgs args) {
    wait_for_launch_before();
    u64 key = 0;
#pragma unroll 1
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < args.n; i += gridDim.x * blockDim.x)
        key = max(key, key_of(args.logits[i], i));
    key = block_max(key);
    if (threadIdx.x == 0) args.partials[blockIdx.x] = key;
    start_next_launch();
    if (!is_last_block(args.ticket, gridDim.x)) return;
    key = 0;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < gridDim.x; i += blockDim.x) key = max(key, __ldcg(args.partials + i));
    key = block_max(key);
    if (threadIdx.x == 0) *args.id = id_of(key);
}

struct TopKArgs {
    // [n] f32 in the first round, else null
    const float* logits;
    // [n] of the round before
    const u64* keys;
    u32 n;
    u32 k;
    // [gridDim.x, k]; null in the last round
    u64* out;
    // last round: [k] f32 and u32, in descending order; -inf and 0xFFFFFFFF where there are fewer
    float* values;
    u32* ids;
};
static_assert(sizeof(TopKArgs) == 48, "as the launcher has it");

constexpr u32 TOP_K_KEYS = 1024;

// One round: each block sorts 1024 keys and keeps its k largest.
extern "C" __global__ void __launch_bounds__(512) top_k(TopKArgs args) {
    wait_for_launch_before();
    __shared__ u64 keys[TOP_K_KEYS];
#pragma unroll 1
    for (u32 i = threadIdx.x; i < TOP_K_KEYS; i += blockDim.x) {
        u32 at = blockIdx.x * TOP_K_KEYS + i;
        u64 key = 0;
        if (at < args.n) key = args.logits != nullptr ? key_of(args.logits[at], at) : args.keys[at];
        keys[i] = key;
    }
#pragma unroll 1
    for (u32 size = 2; size <= TOP_K_KEYS; size *= 2)
#pragma unroll 1
        for (u32 step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            u32 i = threadIdx.x / step * 2 * step + threadIdx.x % step, j = i + step;
            bool descending = (i & size) == 0;
            u64 a = keys[i], b = keys[j];
            if ((a < b) == descending) {
                keys[i] = b;
                keys[j] = a;
            }
        }
    __syncthreads();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < args.k; i += blockDim.x) {
        u64 key = keys[i];
        if (args.out != nullptr) {
            args.out[blockIdx.x * args.k + i] = key;
        } else {
            args.values[i] = key == 0 ? -infinity() : value_of(key);
            args.ids[i] = id_of(key);
        }
    }
}

// Rotates queries and keys, and appends keys and values to the cache. Of one token, or of several at consecutive positions.
#include "common.cuh"

struct RopeAppendArgs {
    // [n_tokens, n_head * head_dim] f32, rotated in place; null where n_head is 0
    float* q;
    // [n_tokens, n_head_kv * head_dim] f32 each, left as they are
    const float* k;
    const float* v;
    // [n_tokens, 2, n_dims] f32: cosines, signed sines (`RopeTable::fill`)
    const float* rotation;
    // the first token's position, in device memory
    const u32* position;
    // [n_head_kv, n_ctx, head_dim] f16 or f32 each; the rows of the positions are overwritten
    void* k_cache;
    void* v_cache;
    u32 n_head, n_head_kv, head_dim, n_dims, n_ctx;
    // 0: pairs of neighbours, 1: pairs half of n_dims apart
    u32 halves;
    // 0: f16, 1: f32
    u32 cache_f32;
};
static_assert(sizeof(RopeAppendArgs) == 88, "as the launcher has it");

__device__ __forceinline__ void store_cached(void* cache, u64 at, float value, u32 is_f32) {
    if (is_f32)
        ((float*)cache)[at] = value;
    else
        ((u16*)cache)[at] = float_to_half(value);
}

// Block (x, y): head x, queries first, then keys, then values; token y. Nothing is written for a position beyond the cache.
extern "C" __global__ void __launch_bounds__(128) rope_append(RopeAppendArgs args) {
    wait_for_launch_before();
    const u32 token = blockIdx.y, first_position = *args.position;
    // no sum, which could go past the largest number
    if (first_position >= args.n_ctx || token >= args.n_ctx - first_position) return;
    const u32 position = first_position + token;
    const u32 head = blockIdx.x, n_heads = args.n_head + args.n_head_kv, dim = args.head_dim;
    if (head >= n_heads) {
        const u32 of = head - n_heads;
        const u64 row = ((u64)of * args.n_ctx + position) * dim;
#pragma unroll 1
        for (u32 d = threadIdx.x; d < dim; d += blockDim.x)
            store_cached(args.v_cache, row + d, args.v[((u64)token * args.n_head_kv + of) * dim + d], args.cache_f32);
        return;
    }
    const bool is_key = head >= args.n_head;
    const u32 of = is_key ? head - args.n_head : head;
    float* q = args.q + ((u64)token * args.n_head + of) * dim;
    const float* from = is_key ? args.k + ((u64)token * args.n_head_kv + of) * dim : q;
    const u64 row = ((u64)of * args.n_ctx + position) * dim;
    const u32 n_pairs = args.n_dims / 2;
    const float *cos = args.rotation + (u64)token * 2 * args.n_dims, *sin = cos + args.n_dims;
#pragma unroll 1
    for (u32 pair = threadIdx.x; pair < n_pairs; pair += blockDim.x) {
        u32 i = args.halves ? pair : 2 * pair, j = args.halves ? pair + n_pairs : 2 * pair + 1;
        float x = from[i], y = from[j];
        float first = fmaf(x, cos[i], __fmul_rn(y, sin[i]));
        float second = fmaf(y, cos[j], __fmul_rn(x, sin[j]));
        if (is_key) {
            store_cached(args.k_cache, row + i, first, args.cache_f32);
            store_cached(args.k_cache, row + j, second, args.cache_f32);
        } else {
            q[i] = first;
            q[j] = second;
        }
    }
    if (is_key)
#pragma unroll 1
        for (u32 d = args.n_dims + threadIdx.x; d < dim; d += blockDim.x)
            store_cached(args.k_cache, row + d, from[d], args.cache_f32);
}

// Attention of several tokens over the cache, on tensor cores. Queries are pairs of a token and one of the heads that share a
// key/value head, 16 a warp; a block goes over the positions that its tokens see, POSITIONS at a time, in ascending order, with
// a running maximum, sum of weights and weighted sum of values.
//
// 8-bit arithmetic: queries, keys, weights and values rounded to f16, sums in f32. f32 arithmetic: what rounding has left is a
// second f16, but for keys and values of an f16 cache, which are what they are.
#include "mma.cuh"

struct AttendBatchArgs {
    // [n_tokens, n_head, head_dim] f32, rotated
    const float* q;
    // [n_head_kv, n_ctx, head_dim] f16 or f32 each
    const void* k_cache;
    const void* v_cache;
    // the first token's position, in device memory; each token sees positions up to its own
    const u32* position;
    // [n_tokens, n_head, head_dim] f32
    float* out;
    // head_dim is a multiple of 8
    u32 n_tokens, n_head, n_head_kv, head_dim, n_ctx;
    // a token sees the last so many positions; 0: all
    u32 window;
    // columns of keys that lie in shared memory at a time: a multiple of 16
    u32 key_columns;
    float scale;
};
static_assert(sizeof(AttendBatchArgs) == 72, "as the launcher has it");

// Positions of a tile.
constexpr u32 POSITIONS = 32;
// Columns of values that a block sums; more are other blocks'.
constexpr u32 VALUE_COLUMNS = 128;
// Queries of a warp.
constexpr u32 WARP_QUERIES = 16;

// Bytes between rows of a tile of `columns` (a multiple of 16) f16: an odd number of 16 bytes, so that eight rows lie in
// different banks.
__device__ __forceinline__ u32 tile_stride(u32 columns) { return columns * 2 + 16; }

// Eight values times `by` as f16; and what rounding has left.
__device__ __forceinline__ void to_eight_halves(const float* values, float by, uint4& high, uint4& low) {
    u32 h[4], l[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float first = values[2 * k] * by, second = values[2 * k + 1] * by;
        h[k] = to_halves(first, second);
        l[k] = rest_halves(first, second, h[k]);
    }
    high = make_uint4(h[0], h[1], h[2], h[3]);
    low = make_uint4(l[0], l[1], l[2], l[3]);
}

__device__ __forceinline__ void load_eight(const float* from, float* values) {
    float4 first = ((const float4*)from)[0], second = ((const float4*)from)[1];
    values[0] = first.x, values[1] = first.y, values[2] = first.z, values[3] = first.w;
    values[4] = second.x, values[5] = second.y, values[6] = second.z, values[7] = second.w;
}

// Copies columns first ... first + columns of POSITIONS rows of a cache to shared memory, zeros where a row has ended. `plane`
// bytes behind lies what rounding has left, where the cache is f32 and SPLIT. Behind position `last` that one again.
template <class Value, bool SPLIT>
__device__ __forceinline__ void copy_tile(u8* to, u32 plane, const Value* cache, u32 start, u32 last, u32 dim, u32 first,
                                          u32 columns) {
    const u32 pieces = columns / 8, stride = tile_stride(columns);
#pragma unroll 2
    for (u32 i = threadIdx.x; i < POSITIONS * pieces; i += blockDim.x) {
        const u32 p = i / pieces, column = first + i % pieces * 8;
        u8* at = to + p * stride + i % pieces * 16;
        const Value* from = cache + (u64)min(start + p, last) * dim + column;
        if (column >= dim) {
            *(uint4*)at = make_uint4(0, 0, 0, 0);
            if (SPLIT && sizeof(Value) == 4) *(uint4*)(at + plane) = make_uint4(0, 0, 0, 0);
        } else if constexpr (sizeof(Value) == 2) {
            copy16(at, from);
        } else {
            float values[8];
            uint4 low;
            load_eight(from, values);
            to_eight_halves(values, 1.0f, *(uint4*)at, low);
            if (SPLIT) *(uint4*)(at + plane) = low;
        }
    }
}

// Block (x, y): queries x; of slices of values and key/value heads the y-th, slices first.
template <class Value, bool SPLIT>
__device__ __forceinline__ void attend_batch(const AttendBatchArgs& args) {
    // of queries, and of keys and values
    constexpr u32 PLANES = SPLIT ? 2 : 1, CACHE_PLANES = SPLIT && sizeof(Value) == 4 ? 2 : 1;
    constexpr int TILES = POSITIONS / 8;
    constexpr float LOG2_E = 1.44269504088896341f;
    extern __shared__ float4 shared[];
    const u32 dim = args.head_dim, columns = (dim + 15) / 16 * 16, queries = blockDim.x / WARP * WARP_QUERIES;
    const u32 slices = (dim + VALUE_COLUMNS - 1) / VALUE_COLUMNS, slice = blockIdx.y % slices, kv = blockIdx.y / slices;
    const u32 first_value = slice * VALUE_COLUMNS, value_columns = min(columns - first_value, VALUE_COLUMNS);
    const u32 q_stride = tile_stride(columns), q_plane = queries * q_stride;
    const u32 k_stride = tile_stride(args.key_columns), k_plane = POSITIONS * k_stride;
    const u32 v_stride = tile_stride(value_columns), v_plane = POSITIONS * v_stride;
    u8 *q_tile = (u8*)shared, *k_tile = q_tile + PLANES * q_plane, *v_tile = k_tile + CACHE_PLANES * k_plane;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 heads_per_kv = args.n_head / args.n_head_kv, n_queries = args.n_tokens * heads_per_kv;
    const u32 first_query = blockIdx.x * queries;
    const Value* keys = (const Value*)args.k_cache + (u64)kv * args.n_ctx * dim;
    const Value* values = (const Value*)args.v_cache + (u64)kv * args.n_ctx * dim;

    wait_for_launch_before();
    const u32 first_position = *args.position;
    auto position_of = [&](u32 query) { return min(first_position + min(query, n_queries - 1) / heads_per_kv, args.n_ctx - 1); };
    auto visible_start = [&](u32 position) { return args.window == 0 || position < args.window ? 0 : position + 1 - args.window; };
#pragma unroll 1
    for (u32 i = threadIdx.x; i < queries * (columns / 8); i += blockDim.x) {
        const u32 of = i / (columns / 8), column = i % (columns / 8) * 8, query = first_query + of;
        uint4 high = make_uint4(0, 0, 0, 0), low = high;
        if (query < n_queries && column < dim) {
            float eight[8];
            load_eight(args.q + ((u64)(query / heads_per_kv) * args.n_head + kv * heads_per_kv + query % heads_per_kv) * dim + column,
                       eight);
            to_eight_halves(eight, args.scale * LOG2_E, high, low);
        }
        u8* at = q_tile + of * q_stride + column * 2;
        *(uint4*)at = high;
        if (SPLIT) *(uint4*)(at + q_plane) = low;
    }
    const u32 begin = visible_start(position_of(first_query)), last = position_of(first_query + queries - 1);
    // of this lane's two queries
    u32 own[2], own_start[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        own[r] = position_of(first_query + warp * WARP_QUERIES + r * 8 + lane / 4);
        own_start[r] = visible_start(own[r]);
    }
    float maxima[2] = {-infinity(), -infinity()}, sums[2] = {0.0f, 0.0f};
    float acc[VALUE_COLUMNS / 8][4];
#pragma unroll
    for (int i = 0; i < VALUE_COLUMNS / 2; i++) (&acc[0][0])[i] = 0.0f;
    const u32 q_at = shared_address(q_tile) + (warp * WARP_QUERIES + lane % 16) * q_stride + lane / 16 * 16;
    const u32 k_at = shared_address(k_tile) + (lane % 8 + lane / 16 * 8) * k_stride + lane / 8 % 2 * 16;
    const u32 v_at = shared_address(v_tile) + lane % 16 * v_stride + lane / 16 * 16;

    copy_tile<Value, SPLIT>(k_tile, k_plane, keys, begin, last, dim, 0, args.key_columns);
    end_copies();
#pragma unroll 1
    for (u32 start = begin; start <= last; start += POSITIONS) {
        copy_tile<Value, SPLIT>(v_tile, v_plane, values, start, last, dim, first_value, value_columns);
        end_copies();
        float scores[TILES][4];
#pragma unroll
        for (int i = 0; i < TILES * 4; i++) (&scores[0][0])[i] = 0.0f;
#pragma unroll 1
        for (u32 first = 0; first < columns; first += args.key_columns) {
            if (first > 0) {
                __syncthreads();
                copy_tile<Value, SPLIT>(k_tile, k_plane, keys, start, last, dim, first, args.key_columns);
                end_copies();
                copies_landed<0>();
            } else {
                copies_landed<1>();
            }
            __syncthreads();
            const u32 end = min(args.key_columns, columns - first);
#pragma unroll 2
            for (u32 d = 0; d < end; d += 16) {
                u32 a[PLANES][4], b[CACHE_PLANES][TILES][2];
#pragma unroll
                for (u32 plane = 0; plane < PLANES; plane++) load_tiles(a[plane], q_at + plane * q_plane + (first + d) * 2);
#pragma unroll
                for (u32 plane = 0; plane < CACHE_PLANES; plane++)
#pragma unroll
                    for (int t = 0; t < TILES; t += 2) load_tiles(b[plane][t], k_at + plane * k_plane + t * 8 * k_stride + d * 2);
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    if (CACHE_PLANES == 2) multiply_add(scores[t], a[0], b[CACHE_PLANES - 1][t]);
                    if (SPLIT) multiply_add(scores[t], a[PLANES - 1], b[0][t]);
                    multiply_add(scores[t], a[0], b[0][t]);
                }
            }
        }
        // weights, and what the sums so far are multiplied by
        float factors[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = maxima[r];
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const u32 p = start + t * 8 + lane % 4 * 2 + c;
                    float& score = scores[t][2 * r + c];
                    if (p > own[r] || p < own_start[r]) score = -infinity();
                    largest = fmaxf(largest, score);
                }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            // nothing seen yet: weights of 0
            const float base = largest == -infinity() ? 0.0f : largest;
            factors[r] = exp2f(maxima[r] - base);
            maxima[r] = largest;
            float sum = 0.0f;
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    float& score = scores[t][2 * r + c];
                    score = exp2f(score - base);
                    sum += score;
                }
            sums[r] = fmaf(sums[r], factors[r], sum);
        }
        // nobody reads the keys any more
        __syncthreads();
        if (start + POSITIONS <= last)
            copy_tile<Value, SPLIT>(k_tile, k_plane, keys, start + POSITIONS, last, dim, 0, args.key_columns);
        end_copies();
        copies_landed<1>();
        __syncthreads();
        u32 a[PLANES][TILES / 2][4];
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float* w = scores[t] + 2 * r;
                const u32 high = to_halves(w[0], w[1]);
                a[0][t / 2][t % 2 * 2 + r] = high;
                if (SPLIT) a[PLANES - 1][t / 2][t % 2 * 2 + r] = rest_halves(w[0], w[1], high);
            }
#pragma unroll
        for (u32 d = 0; d < VALUE_COLUMNS; d += 16) {
            if (d >= value_columns) continue;
            float of_tile[2][4] = {};
#pragma unroll
            for (int t = 0; t < TILES / 2; t++) {
                u32 b[CACHE_PLANES][4];
#pragma unroll
                for (u32 plane = 0; plane < CACHE_PLANES; plane++)
                    load_tiles_transposed(b[plane], v_at + plane * v_plane + t * 16 * v_stride + d * 2);
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    if (CACHE_PLANES == 2) multiply_add(of_tile[n], a[0][t], b[CACHE_PLANES - 1] + 2 * n);
                    if (SPLIT) multiply_add(of_tile[n], a[PLANES - 1][t], b[0] + 2 * n);
                    multiply_add(of_tile[n], a[0][t], b[0] + 2 * n);
                }
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc[d / 8 + n][i] = fmaf(acc[d / 8 + n][i], factors[i / 2], of_tile[n][i]);
        }
        // nobody reads the values any more
        __syncthreads();
    }
    start_next_launch();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = sums[r];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        const u32 query = first_query + warp * WARP_QUERIES + r * 8 + lane / 4;
        if (query >= n_queries) continue;
        float* out = args.out + ((u64)(query / heads_per_kv) * args.n_head + kv * heads_per_kv + query % heads_per_kv) * dim;
#pragma unroll
        for (u32 t = 0; t < VALUE_COLUMNS / 8; t++) {
            const u32 d = first_value + t * 8 + lane % 4 * 2;
            if (t * 8 < value_columns && d < dim)
                *(float2*)(out + d) = make_float2(__fdiv_rn(acc[t][2 * r], sum), __fdiv_rn(acc[t][2 * r + 1], sum));
        }
    }
}

#define ATTEND_BATCH(NAME, VALUE, SPLIT)                                                                       \
    extern "C" __global__ void __launch_bounds__(128) attend_batch_##NAME(AttendBatchArgs args) { \
        attend_batch<VALUE, SPLIT>(args);                                                                      \
    }

ATTEND_BATCH(f16, u16, false)
ATTEND_BATCH(f32, float, false)
ATTEND_BATCH(f16_split, u16, true)
ATTEND_BATCH(f32_split, float, true)

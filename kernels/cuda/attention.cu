// Attention of one token over the cache. The visible positions are divided evenly over at most gridDim.x blocks a group of query
// heads; each gives a state (maximum score, sum of weights, weighted sum of values), and the block that ends last joins the
// states in ascending order.
#include "attention.cuh"

constexpr u32 ATTEND_THREADS = 128;
// Positions of a part at least, where there are several.
constexpr u32 PART_MIN = 32;
// Positions whose scores are held at a time.
constexpr u32 TILE = 64;
// What a thread asks for before it uses the first: values of queries, and states to join.
constexpr u32 QUERIES_TOGETHER = 4, STATES_TOGETHER = 8;
// Threads that share a key: each takes 8 of every 64 values.
constexpr u32 KEY_LANES = 8;

// Makes activations of `values`, `[n_heads, dim]` in shared memory, when all threads have written them. A warp has a block of 32.
__device__ __forceinline__ void store_heads(const AttendArgs& args, const float* values, u32 first_head, u32 n_heads) {
    __syncthreads();
    const u32 first = first_head * args.head_dim / BLOCK;
#pragma unroll 4
    for (u32 block = threadIdx.x / WARP; block < n_heads * args.head_dim / BLOCK; block += ATTEND_THREADS / WARP)
        store_block(args.act, first + block, values[block * BLOCK + threadIdx.x % WARP]);
}

// Block (x, y): part x of the positions, group y of at most HEADS query heads of one key/value head.
template <class C, int HEADS>
__device__ __forceinline__ void attend(const AttendArgs& args) {
    // what is asked for at a time, as far as there are registers
    constexpr u32 KEYS_TOGETHER = HEADS <= 2 ? 2 : 1, VALUES_FIRST = HEADS <= 2 ? 8 : 4;
    // queries [HEADS][dim], later the sums of groups of threads [groups][HEADS][dim]
    extern __shared__ float4 shared[];
    float* buffer = (float*)shared;
    __shared__ float weights[HEADS][TILE];
    __shared__ float maxima[HEADS], sums[HEADS], factors[HEADS];

    const u32 tid = threadIdx.x, lane = tid % WARP, warp = tid / WARP, dim = args.head_dim;
    const u32 heads_per_kv = args.n_head / args.n_head_kv, groups_per_kv = (heads_per_kv + HEADS - 1) / HEADS;
    const u32 kv = blockIdx.y / groups_per_kv, first_of_kv = blockIdx.y % groups_per_kv * HEADS;
    const u32 first_head = kv * heads_per_kv + first_of_kv, n_heads = min((u32)HEADS, heads_per_kv - first_of_kv);
    typename C::Value* const keys = (typename C::Value*)args.k_cache + (u64)kv * args.n_ctx * dim;
    typename C::Value* const values = (typename C::Value*)args.v_cache + (u64)kv * args.n_ctx * dim;

    // that is there: it was written before the launch before this one began
    const u32 position = load_written(args.position);
    wait_for_launch_before();
    start_next_launch();
    if (args.rotation != nullptr) {
#pragma unroll 1
        for (u32 first = tid; first < HEADS * dim; first += QUERIES_TOGETHER * ATTEND_THREADS) {
            float q[QUERIES_TOGETHER];
#pragma unroll
            for (u32 k = 0; k < QUERIES_TOGETHER; k++) {
                const u32 i = first + k * ATTEND_THREADS, d = i % dim;
                q[k] = i < n_heads * dim ? rotated(args, args.q + first_head * dim + i - d, d) : 0.0f;
            }
#pragma unroll
            for (u32 k = 0; k < QUERIES_TOGETHER; k++) {
                const u32 i = first + k * ATTEND_THREADS;
                if (i < HEADS * dim) buffer[i] = q[k] * args.scale;
            }
        }
    } else
#pragma unroll 4
    for (u32 i = tid * 4; i < HEADS * dim; i += ATTEND_THREADS * 4) {
        float4 q = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (i < n_heads * dim) q = *(const float4*)(args.q + first_head * dim + i);
        *(float4*)(buffer + i) = make_float4(q.x * args.scale, q.y * args.scale, q.z * args.scale, q.w * args.scale);
    }
    const u32 visible_end = min(position, args.n_ctx - 1) + 1;
    const u32 visible = args.window == 0 ? visible_end : min(visible_end, args.window);
    const u32 visible_start = visible_end - visible;
    // one, which nothing has to be joined with, as long as it is done at once
    const u32 parts = visible <= (HEADS <= 2 ? 2 : 1) * TILE ? 1 : min(gridDim.x, (visible + PART_MIN - 1) / PART_MIN);
    if (blockIdx.x >= parts) return;
    const u32 begin = visible_start + (u32)((u64)visible * blockIdx.x / parts);
    const u32 end = visible_start + (u32)((u64)visible * (blockIdx.x + 1) / parts);
    if (args.rotation != nullptr && blockIdx.x + 1 == parts && position < args.n_ctx) {
        // only this part reads the row; other groups of the same key/value head write the same to it
        const u64 row = (u64)position * dim;
        for (u32 d = tid; d < dim; d += ATTEND_THREADS) {
            store(keys + row + d, rotated(args, args.k + kv * dim, d));
            store(values + row + d, args.v[kv * dim + d]);
        }
        __threadfence_block();
    }

    if (tid < HEADS) {
        maxima[tid] = -infinity();
        sums[tid] = 0.0f;
    }
    // of a row of values a thread has eight, and every so many positions
    const u32 row_threads = dim / 8, row_groups = ATTEND_THREADS / row_threads;
    const u32 group = tid / row_threads, d_of = tid % row_threads * 8;
    float acc[HEADS][8];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int k = 0; k < 8; k++) acc[h][k] = 0.0f;
    __syncthreads();

#pragma unroll 1
    for (u32 start = begin; start < end; start += TILE) {
        const u32 n = min(TILE, end - start);
        // scores: a thread has the same values of every 16th position
        constexpr u32 ROUNDS = TILE * KEY_LANES / ATTEND_THREADS, STEP = ATTEND_THREADS / KEY_LANES;
        const typename C::Value *tile_keys = keys + (u64)start * dim, *tile_values = values + (u64)start * dim;
        float scores[ROUNDS][HEADS];
#pragma unroll
        for (u32 r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int h = 0; h < HEADS; h++) scores[r][h] = 0.0f;
        const auto load_keys = [&](C(&cached)[ROUNDS], u32 d) {
#pragma unroll
            for (u32 r = 0; r < ROUNDS; r++)
                // behind the last position its key again, whose score is not used
                if (d < dim) cached[r].load(tile_keys + min(tid / KEY_LANES + r * STEP, n - 1) * dim + d);
        };
        const auto add_scores = [&](const C(&cached)[ROUNDS], u32 d) {
            if (d >= dim) return;
#pragma unroll
            for (u32 r = 0; r < ROUNDS; r++) {
                float k[8];
                cached[r].floats(k);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float4* q = (const float4*)(buffer + h * dim + d);
                    float4 low = q[0], high = q[1];
                    float score = scores[r][h];
                    score = fmaf(k[0], low.x, score);
                    score = fmaf(k[1], low.y, score);
                    score = fmaf(k[2], low.z, score);
                    score = fmaf(k[3], low.w, score);
                    score = fmaf(k[4], high.x, score);
                    score = fmaf(k[5], high.y, score);
                    score = fmaf(k[6], high.z, score);
                    scores[r][h] = fmaf(k[7], high.w, score);
                }
            }
        };
#pragma unroll 1
        for (u32 d = tid % KEY_LANES * 8; d < dim; d += KEYS_TOGETHER * KEY_LANES * 8) {
            C cached[KEYS_TOGETHER][ROUNDS];
#pragma unroll
            for (u32 k = 0; k < KEYS_TOGETHER; k++) load_keys(cached[k], d + k * KEY_LANES * 8);
#pragma unroll
            for (u32 k = 0; k < KEYS_TOGETHER; k++) add_scores(cached[k], d + k * KEY_LANES * 8);
        }
        // the first values are asked for before the scores are weighed
        C first_values[VALUES_FIRST];
        if (group < row_groups)
#pragma unroll
            for (u32 r = 0; r < VALUES_FIRST; r++)
                first_values[r].load(tile_values + min(group + r * row_groups, n - 1) * dim + d_of);
#pragma unroll
        for (u32 r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float score = scores[r][h];
#pragma unroll
                for (int step = KEY_LANES / 2; step > 0; step /= 2) score += __shfl_xor_sync(ALL_LANES, score, step);
                u32 p = tid / KEY_LANES + r * STEP;
                if (tid % KEY_LANES == 0) weights[h][p] = p < n ? score : -infinity();
            }
        __syncthreads();
        // weights
#pragma unroll 1
        for (u32 h = warp; h < HEADS; h += ATTEND_THREADS / WARP) {
            float first = weights[h][lane], second = weights[h][lane + WARP];
            float old = maxima[h], largest = fmaxf(old, warp_max(fmaxf(first, second)));
            first = lane < n ? expf(first - largest) : 0.0f;
            second = lane + WARP < n ? expf(second - largest) : 0.0f;
            weights[h][lane] = first;
            weights[h][lane + WARP] = second;
            float sum = warp_sum(first + second);
            // every lane has read the old maximum
            __syncwarp();
            if (lane == 0) {
                // the first tile has nothing to rescale
                float factor = start == begin ? 0.0f : expf(old - largest);
                factors[h] = factor;
                maxima[h] = largest;
                sums[h] = fmaf(sums[h], factor, sum);
            }
        }
        __syncthreads();
        // values
        if (group < row_groups) {
            if (start != begin)
#pragma unroll
                for (int h = 0; h < HEADS; h++)
#pragma unroll
                    for (int k = 0; k < 8; k++) acc[h][k] *= factors[h];
            const auto add_value = [&](const C& cached, u32 p) {
                if (p >= n) return;
                float v[8];
                cached.floats(v);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    float weight = weights[h][p];
#pragma unroll
                    for (int k = 0; k < 8; k++) acc[h][k] = fmaf(v[k], weight, acc[h][k]);
                }
            };
#pragma unroll
            for (u32 r = 0; r < VALUES_FIRST; r++) add_value(first_values[r], group + r * row_groups);
#pragma unroll 1
            for (u32 first = group + VALUES_FIRST * row_groups; first < n; first += 4 * row_groups) {
                C cached[4];
#pragma unroll
                for (u32 r = 0; r < 4; r++)
                    cached[r].load(tile_values + min(first + r * row_groups, n - 1) * dim + d_of);
#pragma unroll
                for (u32 r = 0; r < 4; r++) add_value(cached[r], first + r * row_groups);
            }
        }
        __syncthreads();
    }

    // groups of threads are joined in ascending order
    __syncthreads();
    if (group < row_groups)
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int k = 0; k < 8; k++) buffer[(group * HEADS + h) * dim + d_of + k] = acc[h][k];
    __syncthreads();
    // [parts, n_head, dim] values, then [parts, n_head, 2] maxima and sums
    float* all_values = args.states;
    float2* all_weights = (float2*)(args.states + (u64)gridDim.x * args.n_head * dim);
    float* state = all_values + ((u64)blockIdx.x * args.n_head + first_head) * dim;
#pragma unroll 1
    for (u32 i = tid * 4; i < n_heads * dim; i += ATTEND_THREADS * 4) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (u32 g = 0; g < row_groups; g++) {
            float4 v = *(const float4*)(buffer + g * HEADS * dim + i);
            sum.x += v.x;
            sum.y += v.y;
            sum.z += v.z;
            sum.w += v.w;
        }
        if (parts > 1) {
            *(float4*)(state + i) = sum;
        } else {
            // as the only state of those that are joined below
            const float by = __fdiv_rn(1.0f, sums[i / dim]);
            sum = make_float4(sum.x * by, sum.y * by, sum.z * by, sum.w * by);
            // of the first group, which only this thread has read
            *(float4*)((args.out == nullptr ? buffer : args.out + first_head * dim) + i) = sum;
        }
    }
    if (parts == 1) {
        if (args.out == nullptr) store_heads(args, buffer, first_head, n_heads);
        return;
    }
    if (tid < n_heads)
        all_weights[(u64)blockIdx.x * args.n_head + first_head + tid] = make_float2(maxima[tid], sums[tid]);
    if (!is_last_block(args.tickets + blockIdx.y, parts)) return;

    // what each part's values are multiplied by
    __shared__ float shares[HEADS][ATTEND_PARTS_MAX];
#pragma unroll 1
    for (u32 h = warp; h < n_heads; h += ATTEND_THREADS / WARP)
        share_parts<false>(all_weights + first_head + h, args.n_head, parts, shares[h]);
    __syncthreads();
#pragma unroll 1
    for (u32 i = tid * 4; i < n_heads * dim; i += ATTEND_THREADS * 4) {
        const float* share = shares[i / dim];
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (u32 first = 0; first < parts; first += STATES_TOGETHER) {
            float4 v[STATES_TOGETHER];
#pragma unroll
            for (u32 k = 0; k < STATES_TOGETHER; k++) {
                // behind the last part it again, which is not used
                const u64 part = min(first + k, parts - 1);
                v[k] = __ldcg((const float4*)(all_values + (part * args.n_head + first_head) * dim + i));
            }
#pragma unroll
            for (u32 k = 0; k < STATES_TOGETHER; k++) {
                if (first + k >= parts) break;
                float by = share[first + k];
                add_times(sum, v[k], by);
            }
        }
        // other warps have left `buffer`
        *(float4*)((args.out == nullptr ? buffer : args.out + first_head * dim) + i) = sum;
    }
    if (args.out == nullptr) store_heads(args, buffer, first_head, n_heads);
}

#define ATTEND(C, NAME, HEADS)                                                                            \
    extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) attend_##NAME##_##HEADS(AttendArgs args) { \
        attend<C, HEADS>(args);                                                                           \
    }

ATTEND(CachedF16, f16, 1)
ATTEND(CachedF16, f16, 2)
ATTEND(CachedF16, f16, 4)
ATTEND(CachedF32, f32, 1)
ATTEND(CachedF32, f32, 2)
ATTEND(CachedF32, f32, 4)

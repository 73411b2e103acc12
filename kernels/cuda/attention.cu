// Attention of one token over the cache. The visible positions are divided evenly over gridDim.x blocks a group of query
// heads; each gives a state (maximum score, sum of weights, weighted sum of values), and the block that ends last joins the
// states in ascending order.
#include "common.cuh"

struct AttendArgs {
    // [n_head * head_dim] f32, rotated
    const float* q;
    // [n_head_kv, n_ctx, head_dim] f16 or f32 each
    const void* k_cache;
    const void* v_cache;
    // the token's position, in device memory; it sees positions up to its own
    const u32* position;
    // [n_head * head_dim] f32
    float* out;
    // [gridDim.x, n_head, head_dim + 2] f32
    float* states;
    // [gridDim.y], zeros
    u32* tickets;
    // head_dim is a multiple of 8
    u32 n_head, n_head_kv, head_dim, n_ctx;
    // the token sees the last so many positions; 0: all
    u32 window;
    float scale;
};
static_assert(sizeof(AttendArgs) == 80, "as the launcher has it");

constexpr u32 ATTEND_THREADS = 128;
// Positions whose scores are held at a time.
constexpr u32 TILE = 64;
// Threads that share a key: each takes 8 of every 64 values.
constexpr u32 KEY_LANES = 8;

struct CachedF16 {
    typedef u16 Value;
    static __device__ __forceinline__ void eight(const u16* at, float* v) {
        uint4 q = *(const uint4*)at;
        u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[2 * k] = half_to_float((u16)words[k]);
            v[2 * k + 1] = half_to_float((u16)(words[k] >> 16));
        }
    }
};

struct CachedF32 {
    typedef float Value;
    static __device__ __forceinline__ void eight(const float* at, float* v) {
        float4 low = ((const float4*)at)[0], high = ((const float4*)at)[1];
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};

// Block (x, y): part x of the positions, group y of at most HEADS query heads of one key/value head.
template <class C, int HEADS>
__device__ __forceinline__ void attend(const AttendArgs& args) {
    // queries [HEADS][dim], later the sums of groups of threads [groups][HEADS][dim]
    extern __shared__ float4 shared[];
    float* buffer = (float*)shared;
    __shared__ float weights[HEADS][TILE];
    __shared__ float maxima[HEADS], sums[HEADS], factors[HEADS];

    const u32 tid = threadIdx.x, lane = tid % WARP, warp = tid / WARP, dim = args.head_dim;
    const u32 heads_per_kv = args.n_head / args.n_head_kv, groups_per_kv = (heads_per_kv + HEADS - 1) / HEADS;
    const u32 kv = blockIdx.y / groups_per_kv, first_of_kv = blockIdx.y % groups_per_kv * HEADS;
    const u32 first_head = kv * heads_per_kv + first_of_kv, n_heads = min((u32)HEADS, heads_per_kv - first_of_kv);
    const typename C::Value* keys = (const typename C::Value*)args.k_cache + (u64)kv * args.n_ctx * dim;
    const typename C::Value* values = (const typename C::Value*)args.v_cache + (u64)kv * args.n_ctx * dim;

    const u32 visible_end = min(*args.position, args.n_ctx - 1) + 1;
    const u32 visible = args.window == 0 ? visible_end : min(visible_end, args.window);
    const u32 visible_start = visible_end - visible;
    const u32 begin = visible_start + (u32)((u64)visible * blockIdx.x / gridDim.x);
    const u32 end = visible_start + (u32)((u64)visible * (blockIdx.x + 1) / gridDim.x);

#pragma unroll 1
    for (u32 i = tid; i < HEADS * dim; i += ATTEND_THREADS) {
        u32 head = i / dim, d = i % dim;
        buffer[i] = head < n_heads ? args.q[(first_head + head) * dim + d] * args.scale : 0.0f;
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
        // scores
#pragma unroll 1
        for (u32 p = tid / KEY_LANES; p < TILE; p += ATTEND_THREADS / KEY_LANES) {
            float score[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; h++) score[h] = 0.0f;
            if (p < n) {
                const typename C::Value* key = keys + (u64)(start + p) * dim;
#pragma unroll 1
                for (u32 d = tid % KEY_LANES * 8; d < dim; d += KEY_LANES * 8) {
                    float k[8];
                    C::eight(key + d, k);
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        const float4* q = (const float4*)(buffer + h * dim + d);
                        float4 low = q[0], high = q[1];
                        score[h] = fmaf(k[0], low.x, score[h]);
                        score[h] = fmaf(k[1], low.y, score[h]);
                        score[h] = fmaf(k[2], low.z, score[h]);
                        score[h] = fmaf(k[3], low.w, score[h]);
                        score[h] = fmaf(k[4], high.x, score[h]);
                        score[h] = fmaf(k[5], high.y, score[h]);
                        score[h] = fmaf(k[6], high.z, score[h]);
                        score[h] = fmaf(k[7], high.w, score[h]);
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
#pragma unroll
                for (int step = KEY_LANES / 2; step > 0; step /= 2)
                    score[h] += __shfl_xor_sync(ALL_LANES, score[h], step);
                if (tid % KEY_LANES == 0) weights[h][p] = p < n ? score[h] : -infinity();
            }
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
            for (u32 p = group; p < n; p += row_groups) {
                float v[8];
                C::eight(values + (u64)(start + p) * dim + d_of, v);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    float weight = weights[h][p];
#pragma unroll
                    for (int k = 0; k < 8; k++) acc[h][k] = fmaf(v[k], weight, acc[h][k]);
                }
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
    const u32 state_len = dim + 2;
    float* state = args.states + ((u64)blockIdx.x * args.n_head + first_head) * state_len;
#pragma unroll 1
    for (u32 i = tid; i < n_heads * dim; i += ATTEND_THREADS) {
        u32 h = i / dim, d = i % dim;
        float sum = 0.0f;
#pragma unroll 1
        for (u32 g = 0; g < row_groups; g++) sum += buffer[(g * HEADS + h) * dim + d];
        state[h * state_len + d] = sum;
    }
    if (tid < n_heads) {
        state[tid * state_len + dim] = maxima[tid];
        state[tid * state_len + dim + 1] = sums[tid];
    }
    if (!is_last_block(args.tickets + blockIdx.y, gridDim.x)) return;

#pragma unroll 1
    for (u32 i = tid; i < n_heads * dim; i += ATTEND_THREADS) {
        u32 h = i / dim, d = i % dim;
        float largest = -infinity(), sum = 0.0f, value = 0.0f;
#pragma unroll 1
        for (u32 part = 0; part < gridDim.x; part++) {
            const float* of = args.states + ((u64)part * args.n_head + first_head + h) * state_len;
            float part_largest = __ldcg(of + dim), part_sum = __ldcg(of + dim + 1);
            // a part without positions
            if (part_sum == 0.0f) continue;
            float joint = fmaxf(largest, part_largest);
            float old = sum == 0.0f ? 0.0f : expf(largest - joint), now = expf(part_largest - joint);
            sum = fmaf(part_sum, now, sum * old);
            value = fmaf(__ldcg(of + d), now, value * old);
            largest = joint;
        }
        args.out[(first_head + h) * dim + d] = __fdiv_rn(value, sum);
    }
}

#define ATTEND(C, NAME, HEADS)                                                                            \
    extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) attend_##NAME##_##HEADS(AttendArgs args) { \
        attend<C, HEADS>(args);                                                                           \
    }

ATTEND(CachedF16, f16, 1)
ATTEND(CachedF16, f16, 4)
ATTEND(CachedF16, f16, 8)
ATTEND(CachedF32, f32, 1)
ATTEND(CachedF32, f32, 4)
ATTEND(CachedF32, f32, 8)

// Attention of one token over a cache whose key/value heads have one query head each: a block has a head and a part of the visible
// positions. Each group of lanes that has a row keeps a state (maximum score, sum of weights, weighted sum of values) of every
// so many positions; a block joins those of its groups, and the block that ends last those of all parts, in ascending order.
//
// What it does not find out from other launches of the token comes first: keys and values of earlier tokens are asked for while the
// launch before ends. The token's own are never read from the cache.
#include "attention.cuh"

constexpr u32 LONE_WARPS = 8, LONE_THREADS = LONE_WARPS * WARP;
// Positions of a part at least, where there are several; and up to which there is one.
constexpr u32 LONE_PART_MIN = 128, LONE_ALONE = 256;
// States that a thread asks for before it uses the first.
constexpr u32 LONE_TOGETHER = 8;

// What earlier launches wrote: not from the first cache.
struct LoneF16 : CachedF16 {
    static constexpr int TOGETHER = 8;

    __device__ __forceinline__ void load(const u16* at) { raw = load_cached(at); }
    static __device__ __forceinline__ float rounded(float v) { return half_to_float(float_to_half(v)); }
    static __device__ __forceinline__ float value(u16 v) { return half_to_float(v); }
};

struct LoneF32 : CachedF32 {
    static constexpr int TOGETHER = 4;

    __device__ __forceinline__ void load(const float* at) {
        low = as_floats(load_cached(at));
        high = as_floats(load_cached(at + 4));
    }
    static __device__ __forceinline__ float rounded(float v) { return v; }
    static __device__ __forceinline__ float value(float v) { return v; }
};

template <u32 DIM, class C>
__device__ __forceinline__ void attend_lone(const AttendArgs& args) {
    // lanes that share a row, and rows of a warp at a time
    constexpr u32 LANES = DIM / 8, ROWS = WARP / LANES, GROUPS = LONE_WARPS * ROWS;
    constexpr int TOGETHER = C::TOGETHER;
    static_assert(2 * DIM <= LONE_THREADS, "a thread for each value of the query and of the key");
    __shared__ float own_q[DIM], own_k[DIM], own_v[DIM];
    __shared__ float group_maxima[GROUPS], group_sums[GROUPS];
    __shared__ __align__(16) float group_values[GROUPS][DIM];

    static_assert(sizeof(group_values) >= PREDICT_MEMORY, "room for activations");
    if (predicts_beside<LONE_WARPS>(args, group_values)) return;

    const u32 tid = threadIdx.x, lane = tid % WARP, warp = tid / WARP, head = blockIdx.y;
    const u32 group = warp * ROWS + lane / LANES, d = lane % LANES * 8;
    typename C::Value* const keys = (typename C::Value*)args.k_cache + (u64)head * args.n_ctx * DIM;
    typename C::Value* const values = (typename C::Value*)args.v_cache + (u64)head * args.n_ctx * DIM;

    // that is there: it was written before the launch before this one began
    const u32 position = load_written(args.position);
    const u32 visible_end = min(position, args.n_ctx - 1) + 1;
    const u32 visible = args.window == 0 ? visible_end : min(visible_end, args.window);
    const u32 parts = visible <= LONE_ALONE ? 1 : min(gridDim.x, (visible + LONE_PART_MIN - 1) / LONE_PART_MIN);
    if (blockIdx.x >= parts) return;
    const u32 begin = visible_end - visible + (u32)((u64)visible * blockIdx.x / parts);
    const u32 part_end = visible_end - visible + (u32)((u64)visible * (blockIdx.x + 1) / parts);
    // the last part has the token itself, unless it has no place in the cache
    const bool has_own = blockIdx.x + 1 == parts && position < args.n_ctx;
    const u32 end = has_own ? part_end - 1 : part_end;

    C k[TOGETHER], v[TOGETHER];
    // of a group's rows `start`, `start` + GROUPS, ...; none behind the last
    const auto load = [&](u32 start) {
#pragma unroll
        for (int r = 0; r < TOGETHER; r++)
            if (start + r * GROUPS < end) k[r].load(keys + (u64)(start + r * GROUPS) * DIM + d);
#pragma unroll
        for (int r = 0; r < TOGETHER; r++)
            if (start + r * GROUPS < end) v[r].load(values + (u64)(start + r * GROUPS) * DIM + d);
    };
    u32 start = begin + group;
    load(start);
    wait_for_launch_before();
    start_next_launch();
    if (tid < DIM) {
        const float* q = args.q + head * DIM;
        own_q[tid] = (args.rotation != nullptr ? rotated(args, q, tid) : q[tid]) * args.scale;
    } else if (tid < 2 * DIM && has_own) {
        const u32 of = tid - DIM;
        const u64 at = (u64)position * DIM + of;
        if (args.rotation != nullptr) {
            const float new_k = rotated(args, args.k + head * DIM, of), new_v = args.v[head * DIM + of];
            store(keys + at, new_k);
            store(values + at, new_v);
            own_k[of] = C::rounded(new_k);
            own_v[of] = C::rounded(new_v);
        } else {
            own_k[of] = C::value(keys[at]);
            own_v[of] = C::value(values[at]);
        }
    }
    __syncthreads();
    float q[8];
#pragma unroll
    for (int i = 0; i < 8; i++) q[i] = own_q[d + i];
    float maximum = -infinity(), sum = 0.0f, acc[8];
#pragma unroll
    for (int i = 0; i < 8; i++) acc[i] = 0.0f;

    // the same number of steps in all groups of a warp, which exchange scores
#pragma unroll 1
    for (u32 first = begin + warp * ROWS; first < end; first += GROUPS * TOGETHER) {
        float scores[TOGETHER];
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            float of_key[8];
            k[r].floats(of_key);
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) score = fmaf(of_key[i], q[i], score);
            scores[r] = score;
        }
#pragma unroll
        for (u32 step = LANES / 2; step > 0; step /= 2)
#pragma unroll
            for (int r = 0; r < TOGETHER; r++) scores[r] += __shfl_xor_sync(ALL_LANES, scores[r], step);
        float largest = maximum;
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            if (start + r * GROUPS >= end) scores[r] = -infinity();
            largest = fmaxf(largest, scores[r]);
        }
        const float base = largest == -infinity() ? 0.0f : largest, factor = expf(maximum - base);
        maximum = largest;
        sum *= factor;
#pragma unroll
        for (int i = 0; i < 8; i++) acc[i] *= factor;
#pragma unroll
        for (int r = 0; r < TOGETHER; r++) {
            if (start + r * GROUPS >= end) break;
            const float weight = expf(scores[r] - base);
            sum += weight;
            float of_value[8];
            v[r].floats(of_value);
#pragma unroll
            for (int i = 0; i < 8; i++) acc[i] = fmaf(of_value[i], weight, acc[i]);
        }
        start += GROUPS * TOGETHER;
        load(start);
    }
    if (has_own && warp == 0) {
        // the first group of lanes has the token itself
        float score = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) score = fmaf(own_k[d + i], q[i], score);
#pragma unroll
        for (u32 step = LANES / 2; step > 0; step /= 2) score += __shfl_xor_sync(ALL_LANES, score, step);
        if (group == 0) {
            const float largest = fmaxf(maximum, score), base = largest == -infinity() ? 0.0f : largest;
            const float factor = expf(maximum - base), weight = expf(score - base);
            maximum = largest;
            sum = fmaf(sum, factor, weight);
#pragma unroll
            for (int i = 0; i < 8; i++) acc[i] = fmaf(own_v[d + i], weight, acc[i] * factor);
        }
    }

    if (lane % LANES == 0) group_maxima[group] = maximum, group_sums[group] = sum;
#pragma unroll
    for (int i = 0; i < 8; i += 4) *(float4*)&group_values[group][d + i] = make_float4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
    __syncthreads();
    // the first warp joins them, with four values a lane
    if (warp != 0 && parts == 1) return;
    const bool owns = tid < DIM / 4;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float largest = -infinity(), total = 0.0f;
    if (warp == 0) {
        static_assert(GROUPS <= WARP, "a lane for each");
        const float of_lane = lane < GROUPS ? group_maxima[lane] : -infinity();
        largest = warp_max(of_lane);
        const float factor = expf(of_lane - (largest == -infinity() ? 0.0f : largest));
        total = lane < GROUPS ? group_sums[lane] * factor : 0.0f;
        total = warp_sum(total);
#pragma unroll 4
        for (u32 g = 0; g < GROUPS; g++) {
            const float by = __shfl_sync(ALL_LANES, factor, g);
            const float4 of = *(const float4*)&group_values[g][owns ? tid * 4 : 0];
            add_times(value, of, by);
        }
    }
    if (parts == 1) {
        const float by = __fdiv_rn(1.0f, total);
        value = make_float4(value.x * by, value.y * by, value.z * by, value.w * by);
    } else {
        // [parts, n_head, DIM] values, then [parts, n_head, 2] maxima and sums
        float2* const all_weights = (float2*)(args.states + (u64)gridDim.x * args.n_head * DIM);
        const u64 state = (u64)blockIdx.x * args.n_head + head;
        if (owns) *(float4*)(args.states + state * DIM + tid * 4) = value;
        if (tid == 0) all_weights[state] = make_float2(largest, total);
        if (!is_last_block(args.tickets + blockIdx.y, parts) || warp != 0) return;

        // the first states are asked for before what they are multiplied by
        float4 of[LONE_TOGETHER];
        const auto load_states = [&](u32 first) {
#pragma unroll
            for (u32 part = 0; part < LONE_TOGETHER; part++) {
                // behind the last part it again, which is not used
                const u64 from = min(first + part, parts - 1);
                if (owns) of[part] = __ldcg((const float4*)(args.states + (from * args.n_head + head) * DIM + tid * 4));
            }
        };
        load_states(0);
        __shared__ float shares[ATTEND_PARTS_MAX];
        share_parts<false>(all_weights + head, args.n_head, parts, shares);
        __syncwarp();
        value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (u32 first = 0; owns && first < parts; first += LONE_TOGETHER) {
            if (first != 0) load_states(first);
#pragma unroll
            for (u32 part = 0; part < LONE_TOGETHER; part++) {
                if (first + part >= parts) break;
                const float by = shares[first + part];
                add_times(value, of[part], by);
            }
        }
        __syncwarp();
    }
    if (args.out == nullptr)
        store_quad(args.act, owns ? head * DIM + tid * 4 : args.act.n_blocks * BLOCK, value);
    else if (owns)
        *(float4*)(args.out + head * DIM + tid * 4) = value;
}

#define ATTEND_LONE(DIM, C, NAME)                                                                                   \
    extern "C" __global__ void __launch_bounds__(LONE_THREADS) attend_lone_##NAME##_##DIM(AttendArgs args) { \
        attend_lone<DIM, C>(args);                                                                                  \
    }

ATTEND_LONE(64, LoneF16, f16)
ATTEND_LONE(128, LoneF16, f16)
ATTEND_LONE(64, LoneF32, f32)
ATTEND_LONE(128, LoneF32, f32)

// What all kernels for one token's attention are given, and how they rotate and append it.
#pragma once
#include "activations.cuh"
#include "predict.cuh"

struct AttendArgs {
    // [n_head * head_dim] f32, rotated if `rotation` is null
    const float* q;
    // [n_head_kv, n_ctx, head_dim] f16 or f32 each
    void* k_cache;
    void* v_cache;
    // the token's position, in device memory; it sees positions up to its own
    const u32* position;
    // [n_head * head_dim] f32; null: `act` gets them
    float* out;
    // [gridDim.x, n_head, head_dim + 2] f32; gridDim.x is at most ATTEND_PARTS_MAX
    float* states;
    // [gridDim.y], zeros
    u32* tickets;
    // head_dim is a multiple of 8
    u32 n_head, n_head_kv, head_dim, n_ctx;
    // the token sees the last so many positions; 0: all
    u32 window;
    float scale;
    // the token's own keys and values, [n_head_kv * head_dim] f32 each, which become the cache's row of the position, and its
    // rotation, [2, n_dims] f32; null where that has been done
    const float* k;
    const float* v;
    const float* rotation;
    u32 n_dims;
    // 0: pairs of neighbours, 1: pairs half of n_dims apart
    u32 halves;
    // where `out` is null; head_dim is a multiple of 32 then
    Act act;
    // `attend_group` and `attend_lone`: what blocks with blockIdx.y >= n_groups do
    PredictArgs predict;
    u32 n_groups;
};
static_assert(sizeof(AttendArgs) == 216, "as the launcher has it");

constexpr u32 ATTEND_PARTS_MAX = 64;

// Value d of a head, rotated. Without branches, so that many can be asked for at a time.
__device__ __forceinline__ float rotated(const AttendArgs& args, const float* head, u32 d) {
    const u32 n_pairs = args.n_dims / 2;
    const bool turns = d < args.n_dims;
    const u32 other = args.halves ? (d < n_pairs ? d + n_pairs : d - n_pairs) : d ^ 1;
    const float own = head[d], that = turns ? head[other] : 0.0f;
    const float cosine = turns ? args.rotation[d] : 1.0f, sine = turns ? args.rotation[args.n_dims + d] : 0.0f;
    // as `rope_append` has it
    return turns ? fmaf(own, cosine, __fmul_rn(that, sine)) : own;
}

__device__ __forceinline__ void store(u16* at, float value) { *at = float_to_half(value); }
__device__ __forceinline__ void store(float* at, float value) { *at = value; }

// Whether this block is one of those that predict, of WARPS warps; then it has.
template <u32 WARPS>
__device__ __forceinline__ bool predicts_beside(const AttendArgs& args, void* memory) {
    if (blockIdx.y < args.n_groups) return false;
    predict<Q4_0, WARPS>(args.predict, (blockIdx.y - args.n_groups) * gridDim.x + blockIdx.x, (gridDim.y - args.n_groups) * gridDim.x, memory);
    return true;
}

// Eight cached values, as they are loaded and as f32.
struct CachedF16 {
    typedef u16 Value;
    uint4 raw;

    __device__ __forceinline__ void load(const u16* at) { raw = *(const uint4*)at; }
    __device__ __forceinline__ void floats(float* v) const {
        u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[2 * k] = half_to_float((u16)words[k]);
            v[2 * k + 1] = half_to_float((u16)(words[k] >> 16));
        }
    }
};

struct CachedF32 {
    typedef float Value;
    float4 low, high;

    __device__ __forceinline__ void load(const float* at) {
        low = ((const float4*)at)[0];
        high = ((const float4*)at)[1];
    }
    __device__ __forceinline__ void floats(float* v) const {
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};

// 16 bytes of a cache, which earlier launches wrote: not from the first cache. Several are under way at a time.
__device__ __forceinline__ uint4 load_cached(const void* at) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

__device__ __forceinline__ float4 as_floats(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// sum + v * by.
__device__ __forceinline__ void add_times(float4& sum, float4 v, float by) {
    sum.x = fmaf(v.x, by, sum.x);
    sum.y = fmaf(v.y, by, sum.y);
    sum.z = fmaf(v.z, by, sum.z);
    sum.w = fmaf(v.w, by, sum.w);
}

// What each part's sums of a head's values are multiplied by, [parts]: of the parts' maxima and sums of weights, [parts, n_head]. BASE_2:
// weights are powers of two, not of e. Called by a warp; zeros lie behind the last part.
template <bool BASE_2>
__device__ __forceinline__ void share_parts(const float2* weights, u32 n_head, u32 parts, float (&shares)[ATTEND_PARTS_MAX]) {
    constexpr u32 ROUNDS = ATTEND_PARTS_MAX / WARP;
    const u32 lane = threadIdx.x % WARP;
    float2 of[ROUNDS];
    float largest = -infinity(), total = 0.0f;
#pragma unroll
    for (u32 r = 0; r < ROUNDS; r++) {
        const u32 part = r * WARP + lane;
        of[r] = part < parts ? __ldcg(weights + (u64)part * n_head) : make_float2(-infinity(), 0.0f);
        largest = fmaxf(largest, of[r].x);
    }
    largest = warp_max(largest);
#pragma unroll
    for (u32 r = 0; r < ROUNDS; r++) {
        const float below = of[r].x - largest;
        of[r].x = of[r].y == 0.0f ? 0.0f : BASE_2 ? exp2f(below) : expf(below);
        total += warp_sum(of[r].x * of[r].y);
    }
#pragma unroll
    for (u32 r = 0; r < ROUNDS; r++) shares[r * WARP + lane] = __fdiv_rn(of[r].x, total);
}

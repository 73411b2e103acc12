// Attention of one token over an f16 cache whose key/value heads are shared by several query heads, on tensor cores: a block has
// up to eight of these, and a part of the visible positions, its warps every eighth tile of 16. Each warp keeps a state (maximum
// score, sum of weights, weighted sum of values); a block joins those of its warps, and the block that ends last those of all
// parts, in ascending order.
//
// 8-bit arithmetic: queries and weights are rounded to f16, sums are f32.
//
// Scores are [positions, heads], a product of 16 keys with the queries; the sums [columns of values, heads]. Keys and values go
// from the cache to the registers that products want them in: which of a row's values a lane has there is free, as long as it has
// the same of the query, or writes sums where they belong. So all its loads are of 16 bytes. They come first: what earlier tokens have
// in the cache is asked for while the launch before ends. The token's own key and value take their place when they are there.
#include "attention.cuh"
#include "mma.cuh"

constexpr u32 GROUP_WARPS = 8, GROUP_THREADS = GROUP_WARPS * WARP;
// Query heads of a block: columns of a product.
constexpr u32 GROUP_HEADS = 8;
// Positions of a tile: rows of a product.
constexpr u32 GROUP_TILE = 16;
// Positions of a part at least, where there are several; and up to which there is one.
constexpr u32 GROUP_PART_MIN = 128, GROUP_ALONE = 128;
// States that a thread asks for before it uses the first.
constexpr u32 GROUP_TOGETHER = 16;

// An 8 x 8 tile of f16, of which a lane has two neighbours of row lane / 4, transposed.
__device__ __forceinline__ u32 transposed(u32 tile) {
    u32 to;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(tile));
    return to;
}

__device__ __forceinline__ u32 word(const uint4& v, int k) { return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w; }

template <u32 DIM>
__device__ __forceinline__ void attend_group(const AttendArgs& args) {
    constexpr float LOG2_E = 1.44269504088896341f;
    constexpr u32 KEY_PIECES = DIM / 32, VALUE_PIECES = DIM / 64;
    // f16 between queries of two heads: these lie in different banks
    constexpr u32 Q_STRIDE = DIM + 32;
    // the queries; then sums [GROUP_WARPS, GROUP_HEADS, DIM]
    __shared__ float4 shared[GROUP_WARPS * GROUP_HEADS * DIM / 4];
    __shared__ float warp_maxima[GROUP_WARPS][GROUP_HEADS], warp_sums[GROUP_WARPS][GROUP_HEADS];
    __shared__ float maxima_of_all[GROUP_HEADS], sums_of_all[GROUP_HEADS];
    // the token's own key and value, as the cache has them
    __shared__ __align__(16) u16 own_key[DIM], own_value[DIM];
    u16* const q_tile = (u16*)shared;
    float* const buffer = (float*)shared;

    static_assert(sizeof(shared) >= PREDICT_MEMORY, "room for activations");
    if (predicts_beside<GROUP_WARPS>(args, shared)) return;

    const u32 tid = threadIdx.x, lane = tid % WARP, warp = tid / WARP, row = lane / 4, quarter = lane % 4;
    const u32 heads_per_kv = args.n_head / args.n_head_kv, groups_per_kv = (heads_per_kv + GROUP_HEADS - 1) / GROUP_HEADS;
    const u32 kv = blockIdx.y / groups_per_kv, first_of_kv = blockIdx.y % groups_per_kv * GROUP_HEADS;
    const u32 first_head = kv * heads_per_kv + first_of_kv, n_heads = min(GROUP_HEADS, heads_per_kv - first_of_kv);
    u16* const keys = (u16*)args.k_cache + (u64)kv * args.n_ctx * DIM;
    u16* const values = (u16*)args.v_cache + (u64)kv * args.n_ctx * DIM;

    // that is there: it was written before the launch before this one began
    const u32 position = load_written(args.position);
    const u32 visible_end = min(position, args.n_ctx - 1) + 1;
    const u32 visible = args.window == 0 ? visible_end : min(visible_end, args.window);
    const u32 parts = visible <= GROUP_ALONE ? 1 : min(gridDim.x, (visible + GROUP_PART_MIN - 1) / GROUP_PART_MIN);
    if (blockIdx.x >= parts) return;
    const u32 begin = visible_end - visible + (u32)((u64)visible * blockIdx.x / parts);
    const u32 end = visible_end - visible + (u32)((u64)visible * (blockIdx.x + 1) / parts);
    u32 start = begin + warp * GROUP_TILE;

    // the last part has the token itself, unless it has no place in the cache; what earlier tokens wrote is there
    const bool has_own = blockIdx.x + 1 == parts && position < args.n_ctx;
    const u32 last = has_own ? max(end, 2) - 2 : end - 1;
    uint4 k[KEY_PIECES][2], v[VALUE_PIECES][4];
    // rows behind the last one are that one again: they get no weight, or are the token's own
    const auto load_keys = [&](u32 start) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u16* from = keys + (u64)min(start + row + 8 * r, last) * DIM + quarter * 8;
#pragma unroll
            for (u32 piece = 0; piece < KEY_PIECES; piece++) k[piece][r] = load_cached(from + piece * 32);
        }
    };
    const auto load_values = [&](u32 start) {
#pragma unroll
        for (u32 r = 0; r < 4; r++) {
            const u16* from = values + (u64)min(start + quarter * 2 + r % 2 + r / 2 * 8, last) * DIM + row * 8;
#pragma unroll
            for (u32 piece = 0; piece < VALUE_PIECES; piece++) v[piece][r] = load_cached(from + piece * 64);
        }
    };
    if (start < end) {
        load_keys(start);
        load_values(start);
    }
    wait_for_launch_before();
    start_next_launch();
#pragma unroll
    for (u32 of = 0; of < GROUP_HEADS * DIM / GROUP_THREADS; of++) {
        const u32 i = of * GROUP_THREADS + tid, d = i % DIM;
        float q = 0.0f;
        if (i < n_heads * DIM) {
            const float* head = args.q + first_head * DIM + i - d;
            q = args.rotation != nullptr ? rotated(args, head, d) : head[d];
        }
        q_tile[i / DIM * Q_STRIDE + d] = float_to_half(q * (args.scale * LOG2_E));
    }
    if (has_own && tid < DIM) {
        // other groups of the same key/value head write the same
        const u64 at = (u64)position * DIM + tid;
        u16 key, value;
        if (args.rotation != nullptr) {
            key = float_to_half(rotated(args, args.k + kv * DIM, tid)), value = float_to_half(args.v[kv * DIM + tid]);
            keys[at] = key, values[at] = value;
        } else {
            key = __ldcg(keys + at), value = __ldcg(values + at);
        }
        own_key[tid] = key, own_value[tid] = value;
    }
    __syncthreads();
    uint4 q[KEY_PIECES];
#pragma unroll
    for (u32 piece = 0; piece < KEY_PIECES; piece++) q[piece] = *(const uint4*)(q_tile + row * Q_STRIDE + piece * 32 + quarter * 8);

    // of this lane's two heads
    float maxima[2] = {-infinity(), -infinity()}, sums[2] = {0.0f, 0.0f};
    float acc[DIM / 16][4];
#pragma unroll
    for (u32 i = 0; i < DIM / 4; i++) (&acc[0][0])[i] = 0.0f;

#pragma unroll 1
    for (; start < end; start += GROUP_WARPS * GROUP_TILE) {
        const u32 next = start + GROUP_WARPS * GROUP_TILE;
        if (has_own && position < start + GROUP_TILE) {
            // this tile has the token itself, and what is behind it must be as finite
#pragma unroll
            for (u32 r = 0; r < 2; r++)
                if (start + row + 8 * r >= position)
#pragma unroll
                    for (u32 piece = 0; piece < KEY_PIECES; piece++) k[piece][r] = *(const uint4*)(own_key + piece * 32 + quarter * 8);
#pragma unroll
            for (u32 r = 0; r < 4; r++)
                if (start + quarter * 2 + r % 2 + r / 2 * 8 >= position)
#pragma unroll
                    for (u32 piece = 0; piece < VALUE_PIECES; piece++) v[piece][r] = *(const uint4*)(own_value + piece * 64 + row * 8);
        }
        // two sums, so that a product does not wait for the one before
        float both[2][4] = {};
#pragma unroll
        for (u32 piece = 0; piece < KEY_PIECES; piece++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 a[4] = {word(k[piece][0], 2 * half), word(k[piece][1], 2 * half), word(k[piece][0], 2 * half + 1),
                                  word(k[piece][1], 2 * half + 1)};
                const u32 b[2] = {word(q[piece], 2 * half), word(q[piece], 2 * half + 1)};
                multiply_add(both[half], a, b);
            }
        if (next < end) load_keys(next);
        float scores[2][2], factors[2];
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                scores[r][c] = start + row + 8 * r < end ? both[0][2 * r + c] + both[1][2 * r + c] : -infinity();
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float largest = fmaxf(scores[0][c], scores[1][c]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
            largest = fmaxf(largest, maxima[c]);
            const float base = largest == -infinity() ? 0.0f : largest;
            factors[c] = exp2f(maxima[c] - base);
            maxima[c] = largest;
#pragma unroll
            for (int r = 0; r < 2; r++) scores[r][c] = exp2f(scores[r][c] - base);
            sums[c] = fmaf(sums[c], factors[c], scores[0][c] + scores[1][c]);
        }
        const u32 weights[2] = {transposed(to_halves(scores[0][0], scores[0][1])),
                                transposed(to_halves(scores[1][0], scores[1][1]))};
#pragma unroll
        for (u32 piece = 0; piece < VALUE_PIECES; piece++)
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const u32 rows[4] = {word(v[piece][0], w), word(v[piece][1], w), word(v[piece][2], w), word(v[piece][3], w)};
                // a column's values of two positions in a word; and the next column's
                const u32 a[4] = {__byte_perm(rows[0], rows[1], 0x5410), __byte_perm(rows[0], rows[1], 0x7632),
                                  __byte_perm(rows[2], rows[3], 0x5410), __byte_perm(rows[2], rows[3], 0x7632)};
                float of_tile[4] = {};
                multiply_add(of_tile, a, weights);
#pragma unroll
                for (int i = 0; i < 4; i++) acc[piece * 4 + w][i] = fmaf(acc[piece * 4 + w][i], factors[i % 2], of_tile[i]);
            }
        if (next < end) load_values(next);
    }

    // the block's warps
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sums[c] += __shfl_xor_sync(ALL_LANES, sums[c], step);
        if (row == 0) {
            warp_maxima[warp][quarter * 2 + c] = maxima[c];
            warp_sums[warp][quarter * 2 + c] = sums[c];
        }
    }
    __syncthreads();
    float factors[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float largest = -infinity(), sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < GROUP_WARPS; w++) largest = fmaxf(largest, warp_maxima[w][quarter * 2 + c]);
        const float base = largest == -infinity() ? 0.0f : largest;
        factors[c] = exp2f(maxima[c] - base);
        if (warp != 0 || row != 0) continue;
#pragma unroll
        for (u32 w = 0; w < GROUP_WARPS; w++)
            sum = fmaf(warp_sums[w][quarter * 2 + c], exp2f(warp_maxima[w][quarter * 2 + c] - base), sum);
        maxima_of_all[quarter * 2 + c] = largest;
        sums_of_all[quarter * 2 + c] = sum;
    }
#pragma unroll
    for (u32 piece = 0; piece < VALUE_PIECES; piece++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float eight[8];
#pragma unroll
            for (int w = 0; w < 4; w++)
#pragma unroll
                for (int r = 0; r < 2; r++) eight[2 * w + r] = acc[piece * 4 + w][2 * r + c] * factors[c];
            float4* to = (float4*)(buffer + (warp * GROUP_HEADS + quarter * 2 + c) * DIM + piece * 64 + row * 8);
            to[0] = make_float4(eight[0], eight[1], eight[2], eight[3]);
            to[1] = make_float4(eight[4], eight[5], eight[6], eight[7]);
        }
    __syncthreads();
    // four columns of a head a thread
    const u32 own = tid * 4, own_head = own / DIM;
    const bool owns = own < n_heads * DIM;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (owns)
#pragma unroll
        for (u32 w = 0; w < GROUP_WARPS; w++) {
            const float4 of_warp = *(const float4*)(buffer + w * GROUP_HEADS * DIM + own);
            sum.x += of_warp.x;
            sum.y += of_warp.y;
            sum.z += of_warp.z;
            sum.w += of_warp.w;
        }
    if (parts == 1) {
        const float by = owns ? __fdiv_rn(1.0f, sums_of_all[own_head]) : 0.0f;
        sum = make_float4(sum.x * by, sum.y * by, sum.z * by, sum.w * by);
    } else {
        // [parts, n_head, DIM] values, then [parts, n_head, 2] maxima and sums
        float2* const all_weights = (float2*)(args.states + (u64)gridDim.x * args.n_head * DIM);
        if (owns) *(float4*)(args.states + ((u64)blockIdx.x * args.n_head + first_head) * DIM + own) = sum;
        if (tid < n_heads)
            all_weights[(u64)blockIdx.x * args.n_head + first_head + tid] = make_float2(maxima_of_all[tid], sums_of_all[tid]);
        if (!is_last_block(args.tickets + blockIdx.y, parts)) return;

        // the first states are asked for before what they are multiplied by
        float4 of[GROUP_TOGETHER];
        const auto load_states = [&](u32 first) {
#pragma unroll
            for (u32 part = 0; part < GROUP_TOGETHER; part++) {
                // behind the last part it again, which is not used
                const u64 from = min(first + part, parts - 1);
                if (owns) of[part] = __ldcg((const float4*)(args.states + (from * args.n_head + first_head) * DIM + own));
            }
        };
        load_states(0);
        __shared__ float shares[GROUP_HEADS][ATTEND_PARTS_MAX];
        static_assert(GROUP_WARPS == GROUP_HEADS, "a warp a head");
        if (warp < n_heads) share_parts<true>(all_weights + first_head + warp, args.n_head, parts, shares[warp]);
        __syncthreads();
        sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (u32 first = 0; owns && first < parts; first += GROUP_TOGETHER) {
            if (first != 0) load_states(first);
#pragma unroll
            for (u32 part = 0; part < GROUP_TOGETHER; part++) {
                if (first + part >= parts) break;
                const float by = shares[own_head][first + part];
                add_times(sum, of[part], by);
            }
        }
    }
    if (args.out == nullptr)
        // eight lanes have a block of one head; all call it
        store_quad(args.act, owns ? first_head * DIM + own : args.act.n_blocks * BLOCK, sum);
    else if (owns)
        *(float4*)(args.out + first_head * DIM + own) = sum;
}

#define ATTEND_GROUP(DIM)                                                                                      \
    extern "C" __global__ void __launch_bounds__(GROUP_THREADS) attend_group_##DIM(AttendArgs args) { \
        attend_group<DIM>(args);                                                                               \
    }

ATTEND_GROUP(64)
ATTEND_GROUP(128)

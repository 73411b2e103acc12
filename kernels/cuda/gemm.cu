// Rows times the activations of several tokens, on tensor cores. A block has a tile of rows and tokens, and goes over the
// columns in steps: weights are asked for ahead and kept in registers as they lie in memory, then become f16 in one of two tiles
// of shared memory, while products are taken from the other; activations are f16 already and are copied several steps ahead.
//
// 8-bit arithmetic: weights and activations rounded to f16, products summed in f32. f32 arithmetic: what rounding has left is a
// second f16, of both; three products, and sums that leave the tensor cores after every step, as those cut what they add.
#include "batch.cuh"
#include "quant.cuh"

struct GemmArgs {
    // rows of the format, `stride` bytes apart
    const u8* rows;
    u64 stride;
    Batch x;
    // null, or [n_tokens, n_rows] f32 (may be `out`), or [n_rows] f32: added to the results
    const float* add;
    // [n_tokens, n_rows] f32
    float* out;
    // [tiles, gridDim.y, tile] f32; null where gridDim.y is 1
    float* partials;
    // [tiles], zeros
    u32* tickets;
    u32 n_rows;
    // between tokens of `add`: n_rows or 0
    u32 add_stride;
};
static_assert(sizeof(GemmArgs) == 96, "as the launcher has it");

// What f16 weights are multiplied by, so that small ones and what rounding leaves stay normal numbers.
template <class Q>
constexpr float WEIGHT_SCALE = 16.0f;
template <>
constexpr float WEIGHT_SCALE<F16> = 1.0f;

// Whether a value is an integer times an f16: then f16 arithmetic rounds once.
template <class Q>
constexpr bool IS_INTEGER_TIMES_HALF = false;
template <>
constexpr bool IS_INTEGER_TIMES_HALF<Q4_0> = true;
template <>
constexpr bool IS_INTEGER_TIMES_HALF<Q5_0> = true;
template <>
constexpr bool IS_INTEGER_TIMES_HALF<Q8_0> = true;

// A part's values times WEIGHT_SCALE as f16, two a word; and what rounding has left.
template <class Q, bool SPLIT>
__device__ __forceinline__ void part_halves(const Q& item, u32 at, int part, u32* high, u32* low) {
    if constexpr (IS_INTEGER_TIMES_HALF<Q> && !SPLIT) {
        u32 p[Q::PART / 4];
        item.bytes(part, p);
        const u32 sixteen = 0x4C004C00, d = item.d, scale = multiply_halves(d | d << 16, sixteen);
        // byte b becomes the last bits of 1024 + b
        const u32 offset = (0x6400u + Q::OFFSET) * 0x10001u;
#pragma unroll
        for (int k = 0; k < Q::PART / 4; k++) {
            u32 bytes = Q::SIGNED ? p[k] ^ 0x80808080 : p[k];
            high[2 * k] = multiply_halves(subtract_halves(__byte_perm(bytes, 0x64646464, 0x4140), offset), scale);
            high[2 * k + 1] = multiply_halves(subtract_halves(__byte_perm(bytes, 0x64646464, 0x4342), offset), scale);
        }
    } else {
        float values[Q::PART];
        part_values(item, at, part, values);
#pragma unroll
        for (int k = 0; k < Q::PART / 2; k++) {
            float first = values[2 * k] * WEIGHT_SCALE<Q>, second = values[2 * k + 1] * WEIGHT_SCALE<Q>;
            high[k] = to_halves(first, second);
            if (SPLIT) low[k] = rest_halves(first, second, high[k]);
        }
    }
}

// F16 is what it is, and rounding leaves nothing.
template <>
__device__ __forceinline__ void part_halves<F16, false>(const F16& item, u32, int, u32* high, u32*) {
    high[0] = item.q.x, high[1] = item.q.y, high[2] = item.q.z, high[3] = item.q.w;
}

// A tile of `rows_` rows of COLUMNS f16 in shared memory: pieces of 16 bytes, those of a row in an order of the row's, so that the
// same piece of eight rows lies in different banks.
template <int COLUMNS>
__device__ __forceinline__ u32 piece(u32 row, u32 of_row) {
    constexpr u32 PIECES = COLUMNS / 8, ROWS_PER_LINE = 8 / PIECES;
    return (row * PIECES + (of_row ^ (row / ROWS_PER_LINE % PIECES))) * 16;
}

// TILE_ROWS x TILE_TOKENS of the output by a block of four warps, COLUMNS at a step; activations are copied STAGES - 1 steps
// ahead, weights DEPTH, or fewer where a thread has more than one item of a step. Each warp has WARP_ROWS x WARP_TOKENS where warps have products of their own.
template <int TILE_ROWS_, int TILE_TOKENS_, int COLUMNS_, int WARP_ROWS_, int WARP_TOKENS_, int STAGES_, int DEPTH_, bool SPLIT_>
struct GemmTile {
    static constexpr int TILE_ROWS = TILE_ROWS_, TILE_TOKENS = TILE_TOKENS_, COLUMNS = COLUMNS_;
    static constexpr int STAGES = STAGES_, DEPTH = DEPTH_;
    static constexpr bool SPLIT = SPLIT_;
    static constexpr int THREADS = 4 * WARP;
    static constexpr u32 PLANES = SPLIT ? 2 : 1;
    static constexpr u32 WEIGHT_BYTES = TILE_ROWS * COLUMNS * 2, X_BYTES = TILE_TOKENS * COLUMNS * 2;
    static constexpr u32 SHARED_BYTES = PLANES * (2 * WEIGHT_BYTES + STAGES * X_BYTES);
    // of a warp: sums of M x N tiles of 16 rows and 8 tokens, its tiles ROW_STEP rows apart, its tokens beside each other
    static constexpr int M = HAS_GROUP_PRODUCTS ? TILE_ROWS / 64 : WARP_ROWS_ / 16;
    static constexpr int N = HAS_GROUP_PRODUCTS ? TILE_TOKENS / 8 : WARP_TOKENS_ / 8;
    static constexpr int ROW_STEP = HAS_GROUP_PRODUCTS ? 64 : 16;
    static_assert((TILE_ROWS / WARP_ROWS_) * (TILE_TOKENS / WARP_TOKENS_) == 4, "four warps");
    static_assert(SHARED_BYTES <= 48 << 10, "what every GPU has for two blocks, or one");
    static_assert(BATCH_COLUMNS % COLUMNS == 0, "whole steps");

    static __device__ __forceinline__ u32 warp_row() {
        const u32 warp = threadIdx.x / WARP;
        return HAS_GROUP_PRODUCTS ? warp * 16 : warp % (TILE_ROWS / WARP_ROWS_) * WARP_ROWS_;
    }
    static __device__ __forceinline__ u32 warp_token() {
        const u32 warp = threadIdx.x / WARP;
        return HAS_GROUP_PRODUCTS ? 0 : warp / (TILE_ROWS / WARP_ROWS_) * WARP_TOKENS_;
    }
};

// A thread's weights of a step, as they lie in memory.
template <class Q, class T>
struct RawWeights {
    static constexpr int VALUES = Q::PARTS * Q::PART, ITEMS = T::COLUMNS / VALUES;
    static constexpr int COUNT = T::TILE_ROWS * ITEMS / T::THREADS;
    static_assert(COUNT * T::THREADS == T::TILE_ROWS * ITEMS, "every thread has the same number");
    // registers are few
    static constexpr int DEPTH = COUNT == 1 ? T::DEPTH : COUNT <= 4 ? (T::DEPTH > 2 ? 2 : T::DEPTH) : 1;
    Q items[COUNT];

    __device__ __forceinline__ void load(const GemmArgs& args, u32 first_row, u32 step) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const u32 of = threadIdx.x + i * T::THREADS, at = step * ITEMS + of % ITEMS;
            // behind the last row that row again, whose results nobody wants
            const u8* row = args.rows + min(first_row + of / ITEMS, args.n_rows - 1) * args.stride;
            items[i] = Q();
            if (at < Q::items(args.x.n_cols)) items[i].template load<false>(row, args.x.n_cols, at);
        }
    }

    __device__ __forceinline__ void store(u8* tile, u32 step) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const u32 of = threadIdx.x + i * T::THREADS, row = of / ITEMS;
#pragma unroll
            for (int part = 0; part < Q::PARTS; part++) {
                u32 halves[2][Q::PART / 2];
                part_halves<Q, T::SPLIT>(items[i], step * ITEMS + of % ITEMS, part, halves[0], halves[1]);
                const u32 column = of % ITEMS * VALUES + part * Q::PART;
#pragma unroll
                for (u32 plane = 0; plane < T::PLANES; plane++) {
                    u8* to = tile + plane * T::WEIGHT_BYTES;
                    const u32* h = halves[plane];
                    if constexpr (Q::PART < 8)
                        *(uint2*)(to + piece<T::COLUMNS>(row, column / 8) + column % 8 * 2) = make_uint2(h[0], h[1]);
                    else
#pragma unroll
                        for (int k = 0; k < Q::PART / 8; k++)
                            *(uint4*)(to + piece<T::COLUMNS>(row, column / 8 + k)) =
                                make_uint4(h[4 * k], h[4 * k + 1], h[4 * k + 2], h[4 * k + 3]);
                }
            }
        }
    }
};

// Copies activations of a step.
template <class T>
__device__ __forceinline__ void copy_x(const GemmArgs& args, u8* tile, u32 first_token, u32 step) {
    constexpr u32 PIECES = T::COLUMNS / 8;
    static_assert(T::TILE_TOKENS * PIECES % T::THREADS == 0, "every thread has the same number");
#pragma unroll
    for (u32 i = 0; i < T::TILE_TOKENS * PIECES / T::THREADS; i++) {
        const u32 of = threadIdx.x + i * T::THREADS, token = of / PIECES;
        // behind the last token lies anything, which only results that nobody wants come from
        if (first_token + token >= args.x.n_tokens) break;
        const u64 from = (u64)(first_token + token) * args.x.stride + step * T::COLUMNS + of % PIECES * 8;
        u8* to = tile + piece<T::COLUMNS>(token, of % PIECES);
        copy16(to, args.x.high + from);
        if (T::SPLIT) copy16(to + T::X_BYTES, args.x.low + from);
    }
}

// A warp's sums.
template <class T>
struct WarpSums {
    float of[T::M][T::N][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < T::M * T::N * 4; i++) (&of[0][0][0])[i] = 0.0f;
    }
};

// sums += products of a step's tiles, or = where they are split. Where a group has products, they end at
// `wait_for_group_products`.
template <class T>
__device__ __forceinline__ void multiply_step(WarpSums<T>& sums, u32 weights, u32 x) {
    if constexpr (HAS_GROUP_PRODUCTS) {
        constexpr int ROW_BYTES = T::COLUMNS * 2;
        begin_group_products();
#pragma unroll
        for (u32 k = 0; k < T::COLUMNS / 8; k += 2)
#pragma unroll
            for (int m = 0; m < T::M; m++) {
                const u64 a = tile_descriptor<ROW_BYTES>(weights + m * 64 * ROW_BYTES + k * 16);
                const u64 b = tile_descriptor<ROW_BYTES>(x + k * 16);
                constexpr u64 A_LOW = T::WEIGHT_BYTES >> 4, B_LOW = T::X_BYTES >> 4;
                if (T::SPLIT) {
                    group_multiply_add<T::TILE_TOKENS>(sums.of[m][0], a + A_LOW, b, k > 0);
                    group_multiply_add<T::TILE_TOKENS>(sums.of[m][0], a, b + B_LOW, 1);
                }
                group_multiply_add<T::TILE_TOKENS>(sums.of[m][0], a, b, 1);
            }
        end_group_products();
        return;
    }
    if (T::SPLIT) sums.clear();
    const u32 lane = threadIdx.x % WARP;
    const u32 row = T::warp_row() + lane % 16, token = T::warp_token() + lane % 8 + lane / 16 * 8;
#pragma unroll
    for (u32 k = 0; k < T::COLUMNS / 8; k += 2) {
        u32 a[T::PLANES][T::M][4], b[T::PLANES][T::N][2];
#pragma unroll
        for (u32 plane = 0; plane < T::PLANES; plane++) {
#pragma unroll
            for (int m = 0; m < T::M; m++)
                load_tiles(a[plane][m], weights + plane * T::WEIGHT_BYTES + piece<T::COLUMNS>(row + m * 16, k + lane / 16));
#pragma unroll
            for (int n = 0; n < T::N; n += 2)
                load_tiles(b[plane][n], x + plane * T::X_BYTES + piece<T::COLUMNS>(token + n * 8, k + lane / 8 % 2));
        }
#pragma unroll
        for (int m = 0; m < T::M; m++)
#pragma unroll
            for (int n = 0; n < T::N; n++) {
                if (T::SPLIT) {
                    multiply_add(sums.of[m][n], a[T::PLANES - 1][m], b[0][n]);
                    multiply_add(sums.of[m][n], a[0][m], b[T::PLANES - 1][n]);
                }
                multiply_add(sums.of[m][n], a[0][m], b[0][n]);
            }
    }
}

// Sums of all parts of the columns, in ascending order, where this block is the last of its tile's.
template <class T>
__device__ __forceinline__ bool join_parts(const GemmArgs& args, u32 tile, WarpSums<T>& sums) {
    constexpr int COUNT = T::M * T::N;
    float4* all = (float4*)args.partials + (u64)tile * gridDim.y * COUNT * T::THREADS + threadIdx.x;
    float4* own = all + blockIdx.y * COUNT * T::THREADS;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float* s = sums.of[i / T::N][i % T::N];
        own[i * T::THREADS] = make_float4(s[0], s[1], s[2], s[3]);
    }
    if (!is_last_block(args.tickets + tile, gridDim.y)) return false;
    sums.clear();
#pragma unroll 1
    for (u32 part = 0; part < gridDim.y; part++)
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float* s = sums.of[i / T::N][i % T::N];
            float4 v = __ldcg(all + (part * COUNT + i) * T::THREADS);
            s[0] += v.x, s[1] += v.y, s[2] += v.z, s[3] += v.w;
        }
    return true;
}

// Writes a tile's results, by way of shared memory, so that lanes write rows beside each other.
template <class Q, class T>
__device__ __forceinline__ void store_sums(const GemmArgs& args, const WarpSums<T>& sums, float* tile, u32 first_row,
                                           u32 first_token) {
    // two tiles of 8 tokens of every warp at a time; rows that lie in different banks
    constexpr u32 TOKENS = 16, STRIDE = T::TILE_ROWS + 4, WARP_TOKENS = T::N * 8, ACROSS = T::TILE_TOKENS / WARP_TOKENS;
    static_assert(ACROSS * TOKENS * STRIDE * 4 <= T::SHARED_BYTES, "a part's results fit");
    const u32 lane = threadIdx.x % WARP, across = T::warp_token() / WARP_TOKENS;
#pragma unroll
    for (int n = 0; n < T::N; n += 2) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2 * T::M * 4; i++) {
            const int m = i / 8, of_n = i / 4 % 2, below = i / 2 % 2, second = i % 2;
            const u32 row = T::warp_row() + m * T::ROW_STEP + below * 8 + lane / 4;
            const u32 token = across * TOKENS + of_n * 8 + lane % 4 * 2 + second;
            tile[token * STRIDE + row] = sums.of[m][n + of_n][i % 4];
        }
        __syncthreads();
#pragma unroll 1
        for (u32 i = threadIdx.x; i < ACROSS * TOKENS * T::TILE_ROWS; i += T::THREADS) {
            const u32 of = i / T::TILE_ROWS, row = first_row + i % T::TILE_ROWS;
            const u32 token = first_token + of / TOKENS * WARP_TOKENS + n * 8 + of % TOKENS;
            if (token >= args.x.n_tokens || row >= args.n_rows) continue;
            const float unscale = args.x.unscale[token] * (1.0f / WEIGHT_SCALE<Q>);
            const float result = tile[of * STRIDE + i % T::TILE_ROWS] * unscale;
            float* out = args.out + (u64)token * args.n_rows + row;
            *out = args.add == nullptr ? result : args.add[(u64)token * args.add_stride + row] + result;
        }
    }
}

// Block (x, y): tile x, tokens first, so that blocks beside each other read the same weights; part y of the columns.
template <class Q, class T>
__device__ __forceinline__ void gemm(const GemmArgs& args) {
    extern __shared__ __align__(1024) u8 gemm_tiles[];
    // [2, PLANES, TILE_ROWS, COLUMNS], [STAGES, PLANES, TILE_TOKENS, COLUMNS] f16
    u8 *weights = gemm_tiles, *x = weights + 2 * T::PLANES * T::WEIGHT_BYTES;
    const u32 token_tiles = (args.x.n_tokens + T::TILE_TOKENS - 1) / T::TILE_TOKENS;
    const u32 first_row = blockIdx.x / token_tiles * T::TILE_ROWS, first_token = blockIdx.x % token_tiles * T::TILE_TOKENS;
    const u32 all_steps = args.x.stride / T::COLUMNS;
    const u32 begin = all_steps * blockIdx.y / gridDim.y, steps = all_steps * (blockIdx.y + 1) / gridDim.y - begin;
    auto copy_ahead = [&](u32 step) {
        if (step < steps) copy_x<T>(args, x + step % T::STAGES * T::PLANES * T::X_BYTES, first_token, begin + step);
        end_copies();
    };

    wait_for_launch_before();
    constexpr u32 DEPTH = RawWeights<Q, T>::DEPTH;
    RawWeights<Q, T> raw[DEPTH];
#pragma unroll
    for (u32 step = 0; step < DEPTH; step++)
        if (step < steps) raw[step].load(args, first_row, begin + step);
#pragma unroll
    for (u32 step = 0; step < T::STAGES - 1; step++) copy_ahead(step);
    WarpSums<T> sums;
    sums.clear();
    // turn i makes f16 of the weights of step i, and takes the products of step i - 1
#pragma unroll 1
    for (u32 first = 0; first <= steps; first += DEPTH)
#pragma unroll
        for (u32 of = 0; of < DEPTH; of++) {
            const u32 step = first + of;
            if (step > steps) break;
            copies_landed<T::STAGES - 2>();
            tiles_written();
            // both tiles of the step before are whole, and nobody reads those of the one before that
            __syncthreads();
            const u32 tile = shared_address(weights + (step - 1) % 2 * T::PLANES * T::WEIGHT_BYTES);
            const u32 tile_x = shared_address(x + (step - 1) % T::STAGES * T::PLANES * T::X_BYTES);
            if (step > 0) {
                copy_ahead(step + T::STAGES - 2);
                if (!T::SPLIT) multiply_step<T>(sums, tile, tile_x);
            }
            if (step < steps) raw[of].store(weights + step % 2 * T::PLANES * T::WEIGHT_BYTES, begin + step);
            if (step + DEPTH < steps) raw[of].load(args, first_row, begin + step + DEPTH);
            if (!T::SPLIT) {
                wait_for_group_products();
            } else if (step > 0) {
                WarpSums<T> of_step;
                multiply_step<T>(of_step, tile, tile_x);
                wait_for_group_products();
#pragma unroll
                for (int i = 0; i < T::M * T::N * 4; i++) (&sums.of[0][0][0])[i] += (&of_step.of[0][0][0])[i];
            }
        }
    start_next_launch();
    if (gridDim.y > 1 && !join_parts<T>(args, blockIdx.x, sums)) return;
    store_sums<Q, T>(args, sums, (float*)gemm_tiles, first_row, first_token);
}

// As the launcher has them (`gemm.rs`, `TILES`).
typedef GemmTile<128, 128, 32, 64, 64, 4, 3, false> GemmLarge;
typedef GemmTile<128, 64, 32, 64, 32, 4, 3, false> GemmMiddle;
typedef GemmTile<64, 32, 64, 32, 16, 4, 3, false> GemmSmall;
typedef GemmTile<128, 64, 32, 32, 64, 2, 2, true> GemmSplit;

#define GEMM(Q, NAME, T, BLOCKS)                                                                           \
    extern "C" __global__ void __launch_bounds__(T::THREADS, BLOCKS) gemm_##Q##_##NAME(GemmArgs args) {    \
        gemm<Q, T>(args);                                                                                  \
    }
#define GEMM_TILES(Q)               \
    GEMM(Q, large, GemmLarge, 2)    \
    GEMM(Q, middle, GemmMiddle, 3)  \
    GEMM(Q, small, GemmSmall, 4)    \
    GEMM(Q, split, GemmSplit, 2)

GEMM_TILES(F32)
GEMM_TILES(F16)
GEMM_TILES(BF16)
GEMM_TILES(Q4_0)
GEMM_TILES(Q4_1)
GEMM_TILES(Q5_0)
GEMM_TILES(Q8_0)
GEMM_TILES(Q4_K)
GEMM_TILES(Q5_K)
GEMM_TILES(Q6_K)

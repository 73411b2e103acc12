// Rows times one token's activations, as teams of threads take them.
#pragma once
#include "quant.cuh"
#include "then_norm.cuh"

struct RowsArgs {
    // rows of the format, `stride` bytes apart; the gate's where there are `up` rows
    const u8* rows;
    u64 stride;
    // null: the products themselves are wanted
    const u8* up;
    u64 up_stride;
    // [*n_ids] u32: the rows to take; all where `n_ids` is null
    const u32* ids;
    const u32* n_ids;
    u32 n_rows;
    // places of `ids` and `out`
    u32 n_out;
    Act x;
    // [n_out] f32 or null: added to the results; may be `out`
    const float* add;
    // [n_out] f32, by place in the list: row * x, or act(gate * x) * (up * x)
    float* out;
    // 0: SiLU; 1: ReLU, and up rows of closed gates are not read; 2: ReLU, and they are; 3: GELU
    u32 gates;
    // whether a block's warps take a row together, else each its own
    u32 together;
    // of x
    NormBefore norm;
};
static_assert(sizeof(RowsArgs) == 136, "as the launcher has it");

// Rows times x by a team of `threads`, of which this is thread number `thread`, for 32 rows at most, ROWS at a time, which share what
// is read of x. A thread has items thread, thread + threads, ... of a row; those of the next step are asked for before those of this
// one are used. No bit depends on ROWS.
template <class Q, bool Q8, int ROWS>
struct RowProducts {
    // quantised weights with f32 activations are the oracle, which need not be fast
    static constexpr int TOGETHER = Q8 || !Q::QUANTISED ? Q::TOGETHER / ROWS : 1;
    const Act& x;
    const u32 thread, threads, n_items;
    Q next[ROWS][TOGETHER];

    __device__ __forceinline__ RowProducts(const Act& x, u32 thread, u32 threads)
        : x(x), thread(thread), threads(threads), n_items(Q::items(x.n_cols)) {}

    // Items from the `first` on of the first `n` rows at `rows`.
    __device__ __forceinline__ void load(const u8* const (&rows)[ROWS], int n, u32 first) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= n) break;
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const u32 at = first + k * threads;
                if (at < n_items) next[r][k].load(rows[r], x.n_cols, at);
            }
        }
    }

    // Lane i gets this warp's part of the product of its row, where bit i of `which` is set, else 0. `loaded`: the first step's items
    // are there. With `seconds`, rows of another matrix, pairs of rows with the same number are taken together, and `second` is the
    // product of its.
    template <bool PAIRS>
    __device__ __forceinline__ float products(const u8* rows, u64 stride, const u8* seconds, u64 second_stride, u32 row, u32 which,
                                              bool loaded, float& second) {
        static_assert(!PAIRS || ROWS == 2, "a row of each");
        const u32 lane = threadIdx.x % WARP;
        float mine = 0.0f, acc[ROWS];
        // the rows at hand: of which lanes, and where
        u32 of[ROWS];
        const u8* at[ROWS];
        int n;
        const auto take = [&] {
            n = PAIRS ? 2 : 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                of[r] = which != 0 ? __ffs(which) - 1 : WARP;
                if (!PAIRS) n += which != 0;
                if (!PAIRS || r == 1) which &= which - 1;
                const u64 number = __shfl_sync(ALL_LANES, row, of[r] % WARP);
                at[r] = PAIRS && r == 1 ? seconds + number * second_stride : rows + number * stride;
            }
        };
#pragma unroll
        for (int r = 0; r < ROWS; r++) acc[r] = 0.0f;
        second = 0.0f;
        if (which == 0) return mine;
        u32 first = thread;
        take();
        if (!loaded) load(at, n, first);
#pragma unroll 1
        for (bool more = true; more;) {
            Q items[ROWS][TOGETHER];
            u32 this_of[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                this_of[r] = of[r];
#pragma unroll
                for (int k = 0; k < TOGETHER; k++) items[r][k] = next[r][k];
            }
            const u32 here = first;
            const int this_n = n;
            first += threads * TOGETHER;
            // the same in all threads of a team
            const bool ends = first - thread >= n_items;
            if (ends) {
                more = which != 0;
                if (more) take();
                first = thread;
            }
            if (more) load(at, n, first);
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const u32 item = here + k * threads;
                if (item >= n_items) break;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    if (r >= this_n) break;
                    if constexpr (Q8)
                        acc[r] = add_item_q8(items[r][k], item, x, acc[r]);
                    else
                        acc[r] = add_item_f32(items[r][k], item, x, acc[r]);
                }
            }
            if (ends) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float sum = warp_sum(acc[r]);
                    if (lane == this_of[r]) (PAIRS && r == 1 ? second : mine) = sum;
                    acc[r] = 0.0f;
                }
            }
        }
        return mine;
    }

    __device__ __forceinline__ float products(const u8* rows, u64 stride, u32 row, u32 which, bool loaded) {
        float second;
        return products<false>(rows, stride, nullptr, 0, row, which, loaded, second);
    }
};

constexpr u32 ROWS_WARPS = 4;

// The sum of all warps' parts, in their order, where they take rows together.
__device__ __forceinline__ float of_team(float part, bool together, float (*sums)[WARP]) {
    if (!together) return part;
    const u32 lane = threadIdx.x % WARP;
    __syncthreads();
    sums[threadIdx.x / WARP][lane] = part;
    __syncthreads();
    return (sums[0][lane] + sums[1][lane]) + (sums[2][lane] + sums[3][lane]);
}

struct RowsShared {
    // of warps
    float sums[ROWS_WARPS][WARP];
    __align__(16) float squares[ROWS_WARPS][NORM_BLOCKS];
};

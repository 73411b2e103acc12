// Rows times one token's activations: of a matrix, or gate and up rows of neurons with what lies between them. All rows, or
// those of a list in device memory. One kernel for both, because the product is most of the code.
#include "quant.cuh"

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
};
static_assert(sizeof(RowsArgs) == 120, "as the launcher has it");

constexpr u32 ROWS_WARPS = 4;

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
    // are there.
    __device__ __forceinline__ float products(const u8* rows, u64 stride, u32 row, u32 which, bool loaded) {
        const u32 lane = threadIdx.x % WARP;
        float mine = 0.0f, acc[ROWS];
        // the rows at hand: of which lanes, and where
        u32 of[ROWS];
        const u8* at[ROWS];
        int n;
        const auto take = [&] {
            n = 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                of[r] = which != 0 ? __ffs(which) - 1 : WARP;
                n += which != 0;
                which &= which - 1;
                at[r] = rows + __shfl_sync(ALL_LANES, row, of[r] % WARP) * stride;
            }
        };
#pragma unroll
        for (int r = 0; r < ROWS; r++) acc[r] = 0.0f;
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
                    if (lane == this_of[r]) mine = sum;
                    acc[r] = 0.0f;
                }
            }
        }
        return mine;
    }
};

// The sum of all warps' parts, in their order, where they take rows together.
__device__ __forceinline__ float of_team(float part, bool together, float (*sums)[WARP]) {
    if (!together) return part;
    const u32 lane = threadIdx.x % WARP;
    __syncthreads();
    sums[threadIdx.x / WARP][lane] = part;
    __syncthreads();
    return (sums[0][lane] + sums[1][lane]) + (sums[2][lane] + sums[3][lane]);
}

// A block's rows, of `n`. A row that does not exist gives NaN.
template <class Q, bool Q8, int ROWS>
__device__ __forceinline__ void rows_of_block(const RowsArgs& args, u32 n, u32 teams) {
    __shared__ float sums[ROWS_WARPS][WARP];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 threads = ROWS_WARPS / teams * WARP, team = blockIdx.x * teams + threadIdx.x / threads, step = gridDim.x * teams;
    RowProducts<Q, Q8, ROWS> rows(args.x, threadIdx.x % threads, threads);
    // rows that do not exist are left to the loop
    const u8* first_rows[ROWS];
    int n_first = 0;
    bool loaded = team < n;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u32 j = team + r * step;
        const u32 row = j >= n ? 0 : args.n_ids == nullptr ? j : load_written(args.ids + j);
        first_rows[r] = args.rows + row * args.stride;
        n_first += j < n;
        loaded = loaded && row < args.n_rows;
    }
    if (loaded) rows.load(first_rows, n_first, rows.thread);
    wait_for_launch_before();
    start_next_launch();
#pragma unroll 1
    for (u32 first = team; first < n; first += step * WARP) {
        const u32 j = first + lane * step;
        const u32 row = j >= n ? args.n_rows : args.n_ids == nullptr ? j : load_written(args.ids + j);
        const bool exists = row < args.n_rows;
        float product = rows.products(args.rows, args.stride, row, __ballot_sync(ALL_LANES, exists), loaded);
        loaded = false;
        product = of_team(product, args.together, sums);
        if (args.up != nullptr) {
            // NaN is open; a closed gate gives 0, never -0 or NaN
            const bool closed = (args.gates == 1 || args.gates == 2) && product <= 0.0f;
            const u32 read = __ballot_sync(ALL_LANES, exists && !(closed && args.gates == 1));
            float factor = product;
            if (args.gates == 0) factor = silu(product);
            if (args.gates == 3) factor = gelu(product);
            product = rows.products(args.up, args.up_stride, row, read, false);
            product = of_team(product, args.together, sums);
            product = closed ? 0.0f : factor * product;
        }
        const float result = exists ? product : not_a_number();
        if (j < n && (!args.together || warp == 0)) args.out[j] = args.add == nullptr ? result : args.add[j] + result;
    }
}

// Warps or whole blocks take rows or neurons in steps of the grid, a lane having the result of one.
template <class Q, bool Q8>
__device__ __forceinline__ void rows(const RowsArgs& args) {
    const u32 teams = args.together ? 1 : ROWS_WARPS;
    // lists are there before the launch before this one has ended
    const u32 n = args.n_ids == nullptr ? args.n_rows : min(load_written(args.n_ids), args.n_out);
    // two rows at a time share what is read of x; one alone has all loads
    if constexpr (Q8 && Q::QUANTISED)
        if (n > gridDim.x * teams) return rows_of_block<Q, Q8, 2>(args, n, teams);
    rows_of_block<Q, Q8, 1>(args, n, teams);
}

#define ROWS(Q, MODE, Q8) \
    extern "C" __global__ void __launch_bounds__(ROWS_WARPS * WARP) rows_##Q##_##MODE(RowsArgs args) { rows<Q, Q8>(args); }

ROWS(F32, f32, false)
ROWS(F16, f32, false)
ROWS(BF16, f32, false)
#define ROWS_BOTH(Q)     \
    ROWS(Q, f32, false)  \
    ROWS(Q, q8, true)
ROWS_BOTH(Q4_0)
ROWS_BOTH(Q4_1)
ROWS_BOTH(Q5_0)
ROWS_BOTH(Q8_0)
ROWS_BOTH(Q4_K)
ROWS_BOTH(Q5_K)
ROWS_BOTH(Q6_K)

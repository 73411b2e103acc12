// Rows times one token's activations: of a matrix, or gate and up rows of neurons with what lies between them. All rows, or
// those of a list in device memory. One kernel for both, because the product is most of the code.
#include "rows.cuh"

// A block's rows, of `n`. A row that does not exist gives NaN.
template <class Q, bool Q8, int ROWS>
__device__ __forceinline__ void rows_of_block(const RowsArgs& args, u32 n, u32 teams, RowsShared& shared) {
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
    const NormScale norm(args.norm, args.x, shared.squares[warp]);
    float scale = 1.0f;
#pragma unroll 1
    for (u32 first = team; first < n; first += step * WARP) {
        const u32 j = first + lane * step;
        const u32 row = j >= n ? args.n_rows : args.n_ids == nullptr ? j : load_written(args.ids + j);
        const bool exists = row < args.n_rows;
        float product = rows.products(args.rows, args.stride, row, __ballot_sync(ALL_LANES, exists), loaded);
        loaded = false;
        if (Q8 && Q::QUANTISED && first == team) scale = norm.scale();
        product = __fmul_rn(of_team(product, args.together, shared.sums), scale);
        if (args.up != nullptr) {
            // NaN is open; a closed gate gives 0, never -0 or NaN
            const bool closed = (args.gates == 1 || args.gates == 2) && product <= 0.0f;
            const u32 read = __ballot_sync(ALL_LANES, exists && !(closed && args.gates == 1));
            float factor = product;
            if (args.gates == 0) factor = silu(product);
            if (args.gates == 3) factor = gelu(product);
            product = rows.products(args.up, args.up_stride, row, read, false);
            product = __fmul_rn(of_team(product, args.together, shared.sums), scale);
            product = closed ? 0.0f : factor * product;
        }
        const float result = exists ? product : not_a_number();
        if (j < n && (!args.together || warp == 0)) args.out[j] = args.add == nullptr ? result : args.add[j] + result;
    }
}

// Warps or whole blocks take rows or neurons in steps of the grid, a lane having the result of one.
template <class Q, bool Q8>
__device__ __forceinline__ void rows(const RowsArgs& args) {
    __shared__ RowsShared shared;
    const u32 teams = args.together ? 1 : ROWS_WARPS;
    // lists are there before the launch before this one has ended
    const u32 n = args.n_ids == nullptr ? args.n_rows : min(load_written(args.n_ids), args.n_out);
    // two rows at a time share what is read of x; one alone has all loads
    if constexpr (Q8 && Q::QUANTISED)
        if (n > gridDim.x * teams) return rows_of_block<Q, Q8, 2>(args, n, teams, shared);
    rows_of_block<Q, Q8, 1>(args, n, teams, shared);
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

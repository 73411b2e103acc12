// Gate and up rows of a list of neurons, in 8-bit arithmetic, both of a neuron at once: where nearly all gates are open, waiting for them
// takes longer than reading the other rows.
#include "predict.cuh"

struct RowPairsArgs {
    RowsArgs pairs;
    // what blocks from number n_blocks on do, each warp a row
    PredictHiddenArgs hidden;
    u32 n_blocks;
    // whether the launch before makes the list
    u32 late;
};
static_assert(sizeof(RowPairsArgs) == 240, "as the launcher has it");

// Warps or whole blocks take neurons as `rows` has them, whose bits these are.
template <class Q>
__device__ __forceinline__ void row_pairs(const RowPairsArgs& all) {
    const RowsArgs& args = all.pairs;
    __shared__ RowsShared shared;
    if (blockIdx.x >= all.n_blocks) {
        const u32 warp = (blockIdx.x - all.n_blocks) * ROWS_WARPS + threadIdx.x / WARP;
        return predict_hidden<Q4_0>(all.hidden, warp, (gridDim.x - all.n_blocks) * ROWS_WARPS, shared.squares[threadIdx.x / WARP]);
    }
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, teams = args.together ? 1 : ROWS_WARPS;
    const u32 threads = ROWS_WARPS / teams * WARP, team = blockIdx.x * teams + threadIdx.x / threads, step = all.n_blocks * teams;
    // other lists are there before the launch before this one has ended
    if (all.late) wait_for_launch_before();
    // asked for together
    const u32 listed = load_written(args.n_ids), first_id = load_written(args.ids + min(team, args.n_out - 1));
    const u32 n = min(listed, args.n_out), first_row = team >= n ? 0 : first_id;
    RowProducts<Q, true, 2> rows(args.x, threadIdx.x % threads, threads);
    bool loaded = team < n && first_row < args.n_rows;
    const u8* const first_rows[2] = {args.rows + first_row * args.stride, args.up + first_row * args.up_stride};
    if (loaded) rows.load(first_rows, 2, rows.thread);
    if (!all.late) wait_for_launch_before();
    start_next_launch();
    const NormScale norm(args.norm, args.x, shared.squares[warp]);
    float scale = 1.0f;
#pragma unroll 1
    for (u32 first = team; first < n; first += step * WARP) {
        const u32 j = first + lane * step;
        const u32 row = j >= n ? args.n_rows : load_written(args.ids + j);
        const bool exists = row < args.n_rows;
        float up, gate = rows.template products<true>(args.rows, args.stride, args.up, args.up_stride, row,
                                                      __ballot_sync(ALL_LANES, exists), loaded, up);
        loaded = false;
        if (first == team) scale = norm.scale();
        gate = __fmul_rn(of_team(gate, args.together, shared.sums), scale);
        up = __fmul_rn(of_team(up, args.together, shared.sums), scale);
        // NaN is open; a closed gate gives 0, never -0 or NaN
        const float factor = args.gates == 0 ? silu(gate) : args.gates == 3 ? gelu(gate) : gate;
        const float result = args.gates == 2 && gate <= 0.0f ? 0.0f : factor * up;
        if (j < n && (!args.together || warp == 0)) args.out[j] = exists ? result : not_a_number();
    }
}

// Blocks of a multiprocessor where registers allow them.
#define ROW_PAIRS(Q, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(ROWS_WARPS * WARP, BLOCKS) row_pairs_##Q(RowPairsArgs args) { row_pairs<Q>(args); }

ROW_PAIRS(Q4_0, 6)
ROW_PAIRS(Q4_1, 5)
ROW_PAIRS(Q5_0, 5)
ROW_PAIRS(Q8_0, 6)
ROW_PAIRS(Q4_K, 4)
ROW_PAIRS(Q5_K, 4)
ROW_PAIRS(Q6_K, 4)

// A predictor's work, in 8-bit arithmetic: blocks of the token's own launches that would find no work do it, so that it takes no launch,
// and nothing waits for it. Its hidden values beside gates and ups of the layer before; scores, as a bit for each neuron, beside attention; the
// list of these bits beside the output projection. Predictors are of Q4_0.
#pragma once
#include "rows.cuh"

struct PredictHiddenArgs {
    // [n_rows] rows, `stride` bytes apart; null: nothing is predicted
    const u8* rows;
    u64 stride;
    u32 n_rows;
    Act x;
    // [n_rows] f32 or null: added
    const float* add;
    // [n_rows] f32
    float* out;
    // of x
    NormBefore norm;
};
static_assert(sizeof(PredictHiddenArgs) == 96, "as the launcher has it");

struct PredictArgs {
    // [n_rows] rows, `stride` bytes apart; null: nothing is predicted
    const u8* rows;
    u64 stride;
    // [n_cols] f32
    const float* hidden;
    // [n_rows] f32
    const float* bias;
    // a bit for each row: whether it is above zero; NaN is
    u8* masks;
    u32 n_rows;
    u32 n_cols;
    // whether values of `hidden` below zero become zero
    u32 relu;
    // that take a row: 4 or 8, with PREDICT_TOGETHER items at most
    u32 lanes;
};
static_assert(sizeof(PredictArgs) == 56, "as the launcher has it");

struct ListMasksArgs {
    // [(n + 31) / 32], as `predict` writes them, zeros behind them; null: there is nothing to list
    const u32* masks;
    // [n]: which bits are set, in ascending order
    u32* ids;
    // how many
    u32* count;
    u32 n;
};
static_assert(sizeof(ListMasksArgs) == 32, "as the launcher has it");

// Rows that a warp takes, for a byte of the masks.
constexpr u32 PREDICT_ROWS = 8;
// Items of a row that a lane has at most.
constexpr int PREDICT_TOGETHER = 4;
// Blocks of activations that a warp makes at a time; and most of a row.
constexpr u32 PREDICT_BLOCKS = 4, PREDICT_BLOCKS_MAX = 32;
// What they take of shared memory.
constexpr u32 PREDICT_MEMORY = PREDICT_BLOCKS_MAX * (sizeof(int4) + BLOCK + BLOCK * sizeof(float));

// Activations that lie in shared memory.
__device__ __forceinline__ Act shared_act(void* memory, u32 n_cols) {
    const u32 n_blocks = (n_cols + BLOCK - 1) / BLOCK;
    Act act;
    act.meta = (int4*)memory;
    act.halves = (u8*)memory + n_blocks * sizeof(int4);
    act.values = (float*)(act.halves + n_blocks * BLOCK);
    act.quads = nullptr;
    act.n_blocks = n_blocks;
    act.n_cols = n_cols;
    return act;
}

// Rows of a warp, PREDICT_ROWS of every n_warps-th so many: each lane has all its items of a row at once. Those of the next row are asked for
// before those of this one are used.
template <class Q>
struct PredictRows {
    const PredictArgs& args;
    const u32 n_warps, member, n_items;
    // rows at a time
    const u32 together;
    // of this lane
    u32 row;
    Q next[PREDICT_TOGETHER];
    float next_bias;

    __device__ __forceinline__ PredictRows(const PredictArgs& args, u32 warp, u32 n_warps)
        : args(args), n_warps(n_warps), member(threadIdx.x % args.lanes), n_items(Q::items(args.n_cols)), together(WARP / args.lanes),
          row(warp * PREDICT_ROWS + threadIdx.x % WARP / args.lanes) {
        load();
    }

    __device__ __forceinline__ void load() {
        next_bias = row < args.n_rows ? args.bias[row] : 0.0f;
#pragma unroll
        for (int k = 0; k < PREDICT_TOGETHER; k++) {
            const u32 at = member + k * args.lanes;
            if (at < n_items && row < args.n_rows) next[k].load(args.rows + row * args.stride, args.n_cols, at);
        }
    }

    // Bit r: whether row r of the next eight is above zero. NaN is.
    __device__ __forceinline__ u32 above_zero(const Act& x) {
        const u32 lane = threadIdx.x % WARP;
        u32 mask = 0;
#pragma unroll 1
        for (u32 first = 0; first < PREDICT_ROWS; first += together) {
            Q items[PREDICT_TOGETHER];
#pragma unroll
            for (int k = 0; k < PREDICT_TOGETHER; k++) items[k] = next[k];
            const bool exists = row < args.n_rows;
            const float bias = next_bias;
            row += first + together == PREDICT_ROWS ? together + (n_warps - 1) * PREDICT_ROWS : together;
            load();
            float acc = 0.0f;
#pragma unroll
            for (int k = 0; k < PREDICT_TOGETHER; k++) {
                const u32 at = member + k * args.lanes;
                if (at < n_items && exists) acc = add_item_q8(items[k], at, x, acc);
            }
            for (u32 step = args.lanes / 2; step > 0; step /= 2) acc += __shfl_xor_sync(ALL_LANES, acc, step);
            const u32 above = __ballot_sync(ALL_LANES, exists && !(acc + bias <= 0.0f));
            mask |= __ballot_sync(ALL_LANES, lane < together && above >> lane * args.lanes % WARP & 1) << first;
        }
        return mask;
    }
};

// Scores of all rows, by block `block` of n_blocks that do this, of WARPS warps and with PREDICT_MEMORY of shared memory. What it reads was
// written before the launch before this one started: it waits for nothing.
template <class Q, u32 WARPS>
__device__ __forceinline__ void predict(const PredictArgs& args, u32 block, u32 n_blocks, void* memory) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    PredictRows<Q> rows(args, block * WARPS + warp, n_blocks * WARPS);
    start_next_launch();
    const Act x = shared_act(memory, args.n_cols);
#pragma unroll 1
    for (u32 first = warp; first < x.n_blocks; first += WARPS * PREDICT_BLOCKS) {
        float values[PREDICT_BLOCKS];
#pragma unroll
        for (u32 k = 0; k < PREDICT_BLOCKS; k++) {
            const u32 column = (first + k * WARPS) * BLOCK + lane;
            values[k] = column < args.n_cols ? load_written(args.hidden + column) : 0.0f;
        }
#pragma unroll
        for (u32 k = 0; k < PREDICT_BLOCKS; k++) {
            const u32 at = first + k * WARPS;
            // NaN stays
            if (at < x.n_blocks) store_block(x, at, args.relu && values[k] < 0.0f ? 0.0f : values[k]);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (u32 of = block * WARPS + warp; of * PREDICT_ROWS < args.n_rows; of += n_blocks * WARPS) {
        const u32 mask = rows.above_zero(x);
        if (lane == 0) args.masks[of] = (u8)mask;
    }
}

// Hidden values, a row a warp, of which this is number `warp` of n_warps.
template <class Q>
__device__ __forceinline__ void predict_hidden(const PredictHiddenArgs& args, u32 warp, u32 n_warps, float (&squares)[NORM_BLOCKS]) {
    const u32 lane = threadIdx.x % WARP;
    RowProducts<Q, true, 1> rows(args.x, lane, WARP);
    const u8* const first_rows[1] = {args.rows + warp * args.stride};
    bool loaded = warp < args.n_rows;
    if (loaded) rows.load(first_rows, 1, lane);
    wait_for_launch_before();
    start_next_launch();
    const NormScale norm(args.norm, args.x, squares);
    float scale = 1.0f;
#pragma unroll 1
    for (u32 row = warp; row < args.n_rows; row += n_warps) {
        const float product = rows.products(args.rows, args.stride, row, 1, loaded);
        if (loaded) scale = norm.scale();
        loaded = false;
        if (lane == 0) args.out[row] = __fmul_rn(product, scale) + (args.add == nullptr ? 0.0f : args.add[row]);
    }
}

// The list, by one block of WARPS warps, of which a thread has a word at a time.
template <u32 WARPS>
__device__ __forceinline__ void list_masks(const ListMasksArgs& args) {
    __shared__ u32 counts[2][WARPS];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_words = (args.n + WARP - 1) / WARP;
    wait_for_launch_before();
    start_next_launch();
    u32 before = 0, turn = 0;
#pragma unroll 1
    for (u32 first = 0; first < n_words; first += WARPS * WARP, turn ^= 1) {
        const u32 word = first + threadIdx.x;
        u32 mask = word < n_words ? args.masks[word] : 0;
        const u32 count = __popc(mask);
        u32 sum = count;
#pragma unroll
        for (u32 step = 1; step < WARP; step *= 2) {
            const u32 other = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane == WARP - 1) counts[turn][warp] = sum;
        __syncthreads();
        const u32 of_lane = lane < WARPS ? counts[turn][lane] : 0;
        u32 at = before + (u32)warp_sum((int)(lane < warp ? of_lane : 0)) + sum - count;
        before += (u32)warp_sum((int)of_lane);
        for (; mask != 0; mask &= mask - 1, at++) args.ids[at] = word * WARP + __ffs(mask) - 1;
    }
    if (threadIdx.x == 0) *args.count = before;
}

// Rows times one token's activations, added to a residual stream, and the first half of the norm behind it. A block has the rows of
// a block of activations.
#include "predict.cuh"

struct RowsThenNormArgs {
    // [n_rows] rows, `stride` bytes apart; `n_rows` is a multiple of BLOCK
    const u8* rows;
    u64 stride;
    u32 n_rows;
    Act x;
    // [n_rows] f32, added; may be `out`
    const float* add;
    // [n_rows] f32
    float* out;
    ThenNorm then;
    NormBefore norm;
    // what the last block does, which then has no rows
    ListMasksArgs list;
};
static_assert(sizeof(RowsThenNormArgs) == 248, "as the launcher has it");

constexpr u32 ROWS_NORM_WARPS = 16;
// Rows that a warp takes at a time.
constexpr u32 ROWS_NORM_ROWS = BLOCK / ROWS_NORM_WARPS;

template <class Q>
__device__ __forceinline__ void rows_then_norm(const RowsThenNormArgs& args) {
    __shared__ float results[BLOCK];
    __shared__ __align__(16) float squares[ROWS_NORM_WARPS][NORM_BLOCKS];
    const bool lists = args.list.masks != nullptr;
    if (lists && blockIdx.x == gridDim.x - 1) return list_masks<ROWS_NORM_WARPS>(args.list);
    const u32 n_blocks = gridDim.x - lists;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    RowProducts<Q, true, ROWS_NORM_ROWS> rows(args.x, lane, WARP);
    u32 row = blockIdx.x * BLOCK + warp * ROWS_NORM_ROWS;
    const u8* first_rows[ROWS_NORM_ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS_NORM_ROWS; r++) first_rows[r] = args.rows + (row + r) * args.stride;
    rows.load(first_rows, ROWS_NORM_ROWS, lane);
    float weight = args.then.weight[blockIdx.x * BLOCK + lane];
    wait_for_launch_before();
    start_next_launch();
    const NormScale norm(args.norm, args.x, squares[warp]);
    float scale = 1.0f;
    bool loaded = true;
#pragma unroll 1
    for (u32 block = blockIdx.x; block < args.n_rows / BLOCK; block += n_blocks) {
        const float before = args.add[block * BLOCK + lane];
        row = block * BLOCK + warp * ROWS_NORM_ROWS;
        const float product = rows.products(args.rows, args.stride, row + lane % ROWS_NORM_ROWS, (1 << ROWS_NORM_ROWS) - 1, loaded);
        if (loaded) scale = norm.scale();
        if (!loaded) weight = args.then.weight[block * BLOCK + lane];
        loaded = false;
        if (lane < ROWS_NORM_ROWS) results[warp * ROWS_NORM_ROWS + lane] = __fmul_rn(product, scale);
        __syncthreads();
        if (warp == 0) {
            const float value = before + results[lane];
            args.out[block * BLOCK + lane] = value;
            then_norm(args.then, block, value, weight);
        }
        __syncthreads();
    }
}

#define ROWS_THEN_NORM(Q)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(ROWS_NORM_WARPS * WARP, 1) rows_then_norm_##Q(RowsThenNormArgs args) {       \
        rows_then_norm<Q>(args);                                                                                              \
    }

ROWS_THEN_NORM(Q4_0)
ROWS_THEN_NORM(Q4_1)
ROWS_THEN_NORM(Q5_0)
ROWS_THEN_NORM(Q8_0)
ROWS_THEN_NORM(Q4_K)
ROWS_THEN_NORM(Q5_K)
ROWS_THEN_NORM(Q6_K)

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
    // 0: SiLU; 1: ReLU, and up rows of closed gates are not read; 2: ReLU, and they are
    u32 gates;
    // whether a block's warps take a row together, else each its own
    u32 together;
};
static_assert(sizeof(RowsArgs) == 120, "as the launcher has it");

__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, 1.0f + expf(-x)); }

constexpr u32 ROWS_WARPS = 4;

// Warps or whole blocks take rows or neurons in steps of the grid. A row that does not exist gives NaN.
template <class Q, bool Q8>
__device__ __forceinline__ void rows(const RowsArgs& args) {
    // of the product before and of this one
    __shared__ float sums[2][ROWS_WARPS];
    wait_for_launch_before();
    const u32 warp = threadIdx.x / WARP, teams = args.together ? 1 : ROWS_WARPS;
    const u32 threads = ROWS_WARPS / teams * WARP, thread = threadIdx.x % threads;
    const u32 n = args.n_ids == nullptr ? args.n_rows : min(*args.n_ids, args.n_out);
    u32 turn = 0;
#pragma unroll 1
    for (u32 j = blockIdx.x * teams + threadIdx.x / threads; j < n; j += gridDim.x * teams) {
        const u32 row = args.n_ids == nullptr ? j : args.ids[j];
        float result = not_a_number();
        if (row < args.n_rows) {
            const u8* at = args.rows + row * args.stride;
            float factor = 1.0f;
            // the gate, then up, in the same instructions
#pragma unroll 1
            for (bool more = args.up != nullptr;; more = false) {
                float product = warp_sum(row_part<Q, Q8>(at, args.x, thread, threads));
                if (args.together) {
                    if (threadIdx.x % WARP == 0) sums[turn][warp] = product;
                    __syncthreads();
                    product = (sums[turn][0] + sums[turn][1]) + (sums[turn][2] + sums[turn][3]);
                    turn ^= 1;
                }
                // a closed gate gives 0, never -0
                result = factor == 0.0f ? 0.0f : factor * product;
                if (!more) break;
                // NaN is open
                const bool closed = args.gates != 0 && product <= 0.0f;
                if (closed && args.gates == 1) {
                    result = 0.0f;
                    break;
                }
                factor = closed ? 0.0f : args.gates != 0 ? product : silu(product);
                at = args.up + row * args.up_stride;
            }
        }
        if (thread == 0) args.out[j] = args.add == nullptr ? result : args.add[j] + result;
    }
    start_next_launch();
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

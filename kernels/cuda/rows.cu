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
    // ReLU: up rows of closed gates are not read, the result is 0; else SiLU
    u32 relu;
    // of a row of the format
    u32 row_bytes;
};
static_assert(sizeof(RowsArgs) == 120, "as the launcher has it");

__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, 1.0f + expf(-x)); }

// One warp a row or neuron; warps take them in steps of the grid. A row that does not exist gives NaN.
template <class Q, bool Q8>
__device__ __forceinline__ void rows(const RowsArgs& args) {
    const u32 warps = gridDim.x * blockDim.x / WARP, first = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (args.n_ids == nullptr && first < args.n_rows) {
        u64 line = threadIdx.x % WARP * 128;
        if (line < args.row_bytes) prefetch_line(args.rows + first * args.stride + line);
    }
    wait_for_launch_before();
    const u32 n = args.n_ids == nullptr ? args.n_rows : min(*args.n_ids, args.n_out);
    for (u32 j = first; j < n; j += warps) {
        const u32 row = args.n_ids == nullptr ? j : args.ids[j];
        float result = not_a_number();
        if (row < args.n_rows) {
            const u8* at = args.rows + row * args.stride;
            float factor = 1.0f;
            // the gate, then up, in the same instructions
#pragma unroll 1
            for (bool more = args.up != nullptr;; more = false) {
                float product = row_dot<Q, Q8>(at, args.x);
                result = factor * product;
                if (!more) break;
                if (args.relu && product <= 0.0f) {
                    result = 0.0f;
                    break;
                }
                factor = args.relu ? product : silu(product);
                at = args.up + row * args.up_stride;
            }
        }
        if (threadIdx.x % WARP == 0) args.out[j] = args.add == nullptr ? result : args.add[j] + result;
    }
    start_next_launch();
}

#define ROWS(Q, MODE, Q8) \
    extern "C" __global__ void __launch_bounds__(128) rows_##Q##_##MODE(RowsArgs args) { rows<Q, Q8>(args); }

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

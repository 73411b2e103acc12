#include "quant.cuh"

struct EmbedArgs {
    // [n_rows] rows, `stride` bytes apart
    const u8* rows;
    u64 stride;
    // the token's id, in device memory
    const u32* token;
    u32 n_rows, n_cols;
    // [n_cols] f32
    float* out;
};
static_assert(sizeof(EmbedArgs) == 40, "as the launcher has it");

// The real values of one row. A token that does not exist gives NaN.
template <class Q>
__device__ __forceinline__ void embed(const EmbedArgs& args) {
    wait_for_launch_before();
    const u32 token = *args.token, n_items = Q::items(args.n_cols);
    const u8* row = args.rows + token * args.stride;
#pragma unroll 1
    for (u32 item = blockIdx.x * blockDim.x + threadIdx.x; item < n_items; item += gridDim.x * blockDim.x) {
        Q weights;
        if (token < args.n_rows) weights.load(row, args.n_cols, item);
#pragma unroll
        for (int part = 0; part < Q::PARTS; part++) {
            float w[Q::PART];
            part_values(weights, item, part, w);
            u32 column = Q::column(item, part);
#pragma unroll
            for (int k = 0; k < Q::PART; k++)
                if (column + k < args.n_cols) args.out[column + k] = token < args.n_rows ? w[k] : not_a_number();
        }
    }
}

#define EMBED(Q) \
    extern "C" __global__ void __launch_bounds__(128) embed_##Q(EmbedArgs args) { embed<Q>(args); }

EMBED(F32)
EMBED(F16)
EMBED(BF16)
EMBED(Q4_0)
EMBED(Q4_1)
EMBED(Q5_0)
EMBED(Q8_0)
EMBED(Q4_K)
EMBED(Q5_K)
EMBED(Q6_K)

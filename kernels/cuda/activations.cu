#include "activations.cuh"

struct PrepareArgs {
    // [n_cols] f32
    const float* x;
    Act to;
    // whether values below zero become zero
    u32 relu;
};
static_assert(sizeof(PrepareArgs) == 56, "as the launcher has it");

// Makes activations of x. Grid: any number of blocks of whole warps.
extern "C" __global__ void prepare(PrepareArgs args) {
    wait_for_launch_before();
    const Act& to = args.to;
    const u32 warps = gridDim.x * blockDim.x / WARP;
#pragma unroll 1
    for (u32 block = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; block < to.n_blocks; block += warps) {
        u32 column = block * BLOCK + threadIdx.x % WARP;
        float value = column < to.n_cols ? args.x[column] : 0.0f;
        // NaN stays
        store_block(to, block, args.relu && value < 0.0f ? 0.0f : value);
    }
    start_next_launch();
}

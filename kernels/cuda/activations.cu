#include "activations.cuh"

struct PrepareArgs {
    // [n_cols] f32
    const float* x;
    Act to;
};
static_assert(sizeof(PrepareArgs) == 48, "as the launcher has it");

// Makes activations of x. Grid: any number of blocks of whole warps.
extern "C" __global__ void prepare(PrepareArgs args) {
    wait_for_launch_before();
    const Act& to = args.to;
    const u32 warps = gridDim.x * blockDim.x / WARP;
#pragma unroll 1
    for (u32 block = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; block < to.n_blocks; block += warps) {
        u32 column = block * BLOCK + threadIdx.x % WARP;
        store_block(to, block, column < to.n_cols ? args.x[column] : 0.0f);
    }
    start_next_launch();
}

// What passes between host and device within a token, through memory of the host that both see.
#include "hand_off.cuh"

struct BeginArgs {
    // in host memory: [n], [n_rotation], and position, number of the token
    const float* x_in;
    const float* rotation_in;
    const u32* words_in;
    // on the device, likewise
    float* x;
    float* rotation;
    u32* words;
    // [1] in host memory: when the token began
    u64* stamp;
    u32 n;
    u32 n_rotation;
};
static_assert(sizeof(BeginArgs) == 64, "as the launcher has it");

// Fetches a token. The host wrote it before it launched this.
extern "C" __global__ void __launch_bounds__(1024) begin_token(BeginArgs args) {
    wait_for_launch_before();
    const u32 first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (u32 i = first; i < args.n; i += step) args.x[i] = ((volatile const float*)args.x_in)[i];
    for (u32 i = first; i < args.n_rotation; i += step) args.rotation[i] = ((volatile const float*)args.rotation_in)[i];
    if (first == 0) *args.stamp = time_ns();
    if (first < 2) args.words[first] = ((volatile const u32*)args.words_in)[first];
    start_next_launch();
}

struct HandOverArgs {
    // [n] words on the device
    const u32* from;
    // how many of them are handed over; null: all
    const u32* count;
    // in host memory: [n], and the count where there is one
    u32* to;
    u32* to_count;
    HandOver hand;
    u32 n;
};
static_assert(sizeof(HandOverArgs) == 72, "as the launcher has it");

// Writes words to the host's memory, then the token's number to the flag.
extern "C" __global__ void __launch_bounds__(1024) hand_over(HandOverArgs args) {
    wait_for_launch_before();
    const u32 n = args.count == nullptr ? args.n : min(*args.count, args.n);
    const u32 step = gridDim.x * blockDim.x;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) args.to[i] = args.from[i];
    start_next_launch();
    set_flag(args.hand, args.count == nullptr ? nullptr : args.to_count, n);
}

struct TakeOverArgs {
    TakeOver take;
    // [n] f32: what is taken over is added to it
    float* x;
    u32 n;
};
static_assert(sizeof(TakeOverArgs) == 80, "as the launcher has it");

// Waits for the host, and adds what it hands over: a thread takes two values, of an even number. A block's first thread looks until it
// has its own, so that the others do not keep the link busy meanwhile.
extern "C" __global__ void __launch_bounds__(256) take_over(TakeOverArgs args) {
    wait_for_launch_before();
    const u64 start = time_ns();
    const u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
    const bool has = i < args.n;
    const float2 x = has ? *(const float2*)(args.x + i) : make_float2(0.0f, 0.0f);
    float2 y;
    if (threadIdx.x == 0) y = wait_for_host(args.take, i);
    __syncthreads();
    if (threadIdx.x != 0 && has) y = wait_for_host(args.take, i);
    if (has) *(float2*)(args.x + i) = make_float2(x.x + y.x, x.y + y.y);
    start_next_launch();
    if (blockIdx.x != 0) return;
    __syncthreads();
    if (threadIdx.x == 0) args.take.stamps[0] = start, args.take.stamps[1] = time_ns();
}

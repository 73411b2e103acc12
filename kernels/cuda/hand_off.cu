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
static_assert(sizeof(TakeOverArgs) == 72, "as the launcher has it");

// Waits for the host, and adds what it hands over.
extern "C" __global__ void __launch_bounds__(256) take_over(TakeOverArgs args) {
    wait_for_launch_before();
    wait_for_host(args.take);
    const u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i + 3 < args.n) {
        float4 y;
        asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w)
                     : "l"(args.take.from + i)
                     : "memory");
        float4 x = *(const float4*)(args.x + i);
        *(float4*)(args.x + i) = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    } else {
        for (u32 k = i; k < args.n; k++) args.x[k] += ((volatile const float*)args.take.from)[k];
    }
    start_next_launch();
}

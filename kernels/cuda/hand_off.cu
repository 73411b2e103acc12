// What passes between host and device within a token, through memory of the host that both see. Values are written first, then
// a flag: the token's number. Who waits for it reads it with acquire semantics at the system's scope.
#include "common.cuh"

__device__ __forceinline__ u32 load_acquire(const u32* at) {
    u32 value;
#if __CUDA_ARCH__ >= 700
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
#else
    value = *(volatile const u32*)at;
    __threadfence_system();
#endif
    return value;
}

__device__ __forceinline__ void store_release(u32* at, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Nanoseconds, the same on all multiprocessors.
__device__ __forceinline__ u64 time_ns() {
    u64 ns;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
    return ns;
}

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
    u32* flag;
    const u32* number;
    // zero
    u32* ticket;
    // [1] in host memory: when it was handed over
    u64* stamp;
    u32 n;
};
static_assert(sizeof(HandOverArgs) == 72, "as the launcher has it");

// Writes words to the host's memory, then the token's number to the flag.
extern "C" __global__ void __launch_bounds__(1024) hand_over(HandOverArgs args) {
    wait_for_launch_before();
    const u32 n = args.count == nullptr ? args.n : min(*args.count, args.n);
    const u32 step = gridDim.x * blockDim.x;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) args.to[i] = args.from[i];
    __threadfence_system();
    start_next_launch();
    if (!is_last_block(args.ticket, gridDim.x)) return;
    if (threadIdx.x == 0) {
        if (args.count != nullptr) *args.to_count = n;
        *args.stamp = time_ns();
        __threadfence_system();
        store_release(args.flag, *args.number);
    }
}

struct TakeOverArgs {
    // in host memory: [n] f32, and the flag behind which they are there
    const float* from;
    const u32* flag;
    const u32* number;
    // [n] f32: what is taken over is added to it
    float* x;
    // set when the host is late, on the device and in host memory
    u32* late;
    u32* late_host;
    // [2] in host memory: when the wait began and ended
    u64* stamps;
    u64 limit_ns;
    u32 n;
};
static_assert(sizeof(TakeOverArgs) == 72, "as the launcher has it");

// Waits for the host, but not for ever, and adds what it hands over. Once the host was late nothing waits any more: the
// token is lost, and its results are not used.
extern "C" __global__ void __launch_bounds__(256) take_over(TakeOverArgs args) {
    wait_for_launch_before();
    if (threadIdx.x == 0) {
        const u32 number = *args.number;
        const u64 start = time_ns();
        while (load_acquire(args.flag) != number) {
            if (*(volatile const u32*)args.late != 0) break;
            if (time_ns() - start > args.limit_ns) {
                *(volatile u32*)args.late = 1;
                *(volatile u32*)args.late_host = 1;
                __threadfence_system();
                break;
            }
        }
        if (blockIdx.x == 0) {
            args.stamps[0] = start;
            args.stamps[1] = time_ns();
        }
    }
    __syncthreads();
    const u32 i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (i + 3 < args.n) {
        float4 y;
        asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(y.x), "=f"(y.y), "=f"(y.z), "=f"(y.w)
                     : "l"(args.from + i)
                     : "memory");
        float4 x = *(const float4*)(args.x + i);
        *(float4*)(args.x + i) = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    } else {
        for (u32 k = i; k < args.n; k++) args.x[k] += ((volatile const float*)args.from)[k];
    }
    start_next_launch();
}

// Flags in memory of the host that both sides see. Values are written first, then a flag: the token's number. Who waits for it
// reads it with acquire semantics at the system's scope.
#pragma once
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

// How something is handed over to the host.
struct HandOver {
    // in host memory
    u32* flag;
    const u32* number;
    // zero
    u32* ticket;
    // [1] in host memory: when it was handed over
    u64* stamp;
};

// Sets the flag when all blocks have come here, behind everything that they wrote. Called by whole blocks.
__device__ __forceinline__ void set_flag(const HandOver& hand, u32* to_count, u32 count) {
    __threadfence_system();
    if (!is_last_block(hand.ticket, gridDim.x)) return;
    if (threadIdx.x == 0) {
        if (to_count != nullptr) *to_count = count;
        *hand.stamp = time_ns();
        __threadfence_system();
        store_release(hand.flag, *hand.number);
    }
}

// How f32 values are taken over from the host.
struct TakeOver {
    // in host memory, 8 bytes a value: its bits, and the tag of what it belongs to, the token's number + `plus`. Both are written
    // and read as one word, so that a value with its tag is there, whatever else is.
    const uint2* from;
    // set when all are there, or nothing more will come
    const u32* flag;
    const u32* number;
    // set when the host is late, on the device and in host memory
    u32* late;
    u32* late_host;
    // [2] in host memory: when the first block's wait began and ended
    u64* stamps;
    u64 limit_ns;
    u32 plus;
};

// Looks at values between looks at the flag and the clock.
constexpr u32 LOOKS = 64;

// Values i and i + 1 with their tags, as they are now; `i` is even.
__device__ __forceinline__ uint4 look(const TakeOver& take, u32 i) {
    uint4 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(take.from + i)
                 : "memory");
    return v;
}

// Waits for values i and i + 1, but not for ever. Once the host was late nothing waits any more: the token is lost, and its
// results are not used.
__device__ __forceinline__ float2 wait_for_host(const TakeOver& take, u32 i) {
    const u32 number = *take.number, tag = number + take.plus;
    const u64 start = time_ns();
    uint4 v = look(take, i);
    for (u32 n = 1; v.y != tag || v.w != tag; n++) {
        if (n % LOOKS == 0) {
            const bool told = load_acquire(take.flag) == number;
            const bool late = time_ns() - start > take.limit_ns;
            if (late) {
                *(volatile u32*)take.late = 1;
                *(volatile u32*)take.late_host = 1;
                __threadfence_system();
            }
            if (told || late || *(volatile const u32*)take.late != 0) {
                v = look(take, i);
                break;
            }
        }
        v = look(take, i);
    }
    return make_float2(__uint_as_float(v.x), __uint_as_float(v.z));
}

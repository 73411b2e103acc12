// Types, loads, conversions and warp reductions that all families share. Compiled by NVRTC: no header of the toolkit.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xFFFFFFFFu;
// Values of an activation block.
constexpr u32 BLOCK = 32;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7FC00000); }

constexpr __host__ __device__ u64 padded16(u64 bytes) { return (bytes + 15) & ~u64(15); }

// 16 bytes that nobody reads again before they have left the first cache.
__device__ __forceinline__ uint4 load16_once(const void* at) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(at));
    return v;
}

// 16 bytes; the second cache fetches those around them too.
__device__ __forceinline__ uint4 load16_and_behind(const void* at) {
    uint4 v;
#if __CUDA_ARCH__ >= 800
    asm("ld.global.nc.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
#else
    asm("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
#endif
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(at));
    return v;
}

// Weights that neighbouring lanes read too. Only weights are read like this, as memory that nobody writes: the compiler may move
// such loads to before `wait_for_launch_before`.
__device__ __forceinline__ uint4 load16(const void* at) { return __ldg((const uint4*)at); }
__device__ __forceinline__ u32 load4(const void* at) { return __ldg((const u32*)at); }
__device__ __forceinline__ u16 load2(const void* at) { return __ldg((const u16*)at); }

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// To nearest, ties to even; beyond the range lies infinity.
__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float bfloat_to_float(u32 bits) { return __uint_as_float(bits << 16); }

// acc + sum of four products, unsigned by signed bytes.
__device__ __forceinline__ int dot4_unsigned(u32 weights, u32 x, int acc) {
    int sum;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(weights), "r"(x), "r"(acc));
    return sum;
}

__device__ __forceinline__ int dot4_signed(u32 weights, u32 x, int acc) {
    int sum;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(weights), "r"(x), "r"(acc));
    return sum;
}

// Byte `k` of four unsigned ones, less `offset`, as f32: the byte becomes the last bits of 2^23 + byte.
template <int k>
__device__ __forceinline__ float byte_to_float(u32 bytes, float offset) {
    u32 bits = __byte_perm(bytes, 0x4B000000u, 0x7440 + k);
    return __uint_as_float(bits) - (8388608.0f + offset);
}

// What a launch before the one before this has written: it may be read before `wait_for_launch_before`, but not from the first
// cache, which may hold what was there earlier. Several such loads are under way at a time: unlike `__ldcg` it lets the compiler move
// other memory accesses past it.
__device__ __forceinline__ u32 load_written(const u32* at) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

__device__ __forceinline__ float load_written(const float* at) { return __uint_as_float(load_written((const u32*)at)); }

// Past the first cache, whoever writes and reads there meanwhile; in no order with others.
__device__ __forceinline__ u32 load_relaxed(const u32* at) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

__device__ __forceinline__ void store_relaxed(u32* at, u32 v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

// Every kernel calls it before it reads or writes what other launches write or read. From Hopper on a kernel may be started
// before the one before it has ended: what comes before this call overlaps that one's end, what comes behind it is ordered as
// usual. (Blocks that only need what launches before that one wrote do not call it, if others of their launch do.)
__device__ __forceinline__ void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Every kernel's blocks call it, behind `wait_for_launch_before` if they call that. The next kernel's blocks start when all have, and find room as blocks
// of this one end. Kernels of few blocks, and products, call it at once: what comes next has asked for its first rows, or for what is
// cached, by the time it may go on. Others do when most of the work is done.
__device__ __forceinline__ void start_next_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Every lane gets the sum, in one order: lanes 16 apart first, neighbours last.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

__device__ __forceinline__ int warp_sum(int v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, 1.0f + expf(-x)); }

// The tanh form, as the CPU has it: x / (1 + exp(-2 u)), -2 u = x (c + d x^2).
__device__ __forceinline__ float gelu(float x) {
    return __fdiv_rn(x, 1.0f + expf(__fmul_rn(fmaf(__fmul_rn(x, x), -0.071354814f, -1.5957692f), x)));
}

// Whether this block is the last of `n` that called it with the same ticket; then what the others wrote before is
// visible, and the ticket is 0 again. Called by all threads of the block.
__device__ __forceinline__ bool is_last_block(u32* ticket, u32 n) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before = atomicAdd(ticket, 1u);
        last = before + 1 == n;
        if (last) *ticket = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// Activations of one token, as `activations.cu` writes them.
struct Act {
    // [n_blocks * 32] f32, zeros behind the last column
    float* values;
    // f32 arithmetic: [8, n_blocks, 4] f32, so that lanes with neighbouring blocks read neighbouring bytes; else null
    float4* quads;
    // 8-bit arithmetic: [2, n_blocks, 16] i8, first and second halves of blocks; else null
    u8* halves;
    // 8-bit arithmetic: [n_blocks] of scale (f32 bits), sums of both halves, 0; else null
    int4* meta;
    u32 n_blocks;
    u32 n_cols;

    // 16 8-bit values from column 16 * half on.
    __device__ __forceinline__ uint4 q16(u32 half) const {
        return ((const uint4*)halves)[(half & 1) * n_blocks + (half >> 1)];
    }
    // Values 4 * quad ... 4 * quad + 3 of a block.
    __device__ __forceinline__ float4 quad(u32 block, u32 quad) const { return quads[quad * n_blocks + block]; }
};
static_assert(sizeof(Act) == 40, "as the launcher has it");

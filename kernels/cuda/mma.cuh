// Tensor cores: tiles of f16 in shared memory, fragments in registers, products with f32 sums. One source for every
// architecture: before 8.0 a product is two of half the depth, and copies to shared memory wait at once; on 9.0 a group of four
// warps has products of its own, which read both tiles from shared memory while the warps do something else.
#pragma once
#include "common.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAS_GROUP_PRODUCTS = true;
#else
constexpr bool HAS_GROUP_PRODUCTS = false;
#endif

__device__ __forceinline__ u32 shared_address(const void* at) { return (u32)__cvta_generic_to_shared(at); }

// Copies 16 bytes to shared memory; they are there after `copies_landed`. What other launches wrote may be read.
__device__ __forceinline__ void copy16(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
    *(uint4*)to = *(const uint4*)from;
#endif
}

// Ends a group of copies, which may be empty.
__device__ __forceinline__ void end_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies, but for those of the last PENDING groups.
template <int PENDING>
__device__ __forceinline__ void copies_landed() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Four 8 x 8 tiles of f16; lane 8 i + j gives the address of row j of tile i. A lane gets two neighbours of row lane / 4 of each.
__device__ __forceinline__ void load_tiles(u32* tiles, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

// The same, each tile transposed.
__device__ __forceinline__ void load_tiles_transposed(u32* tiles, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

// sums [16, 8] += a [16, 16] * b [16, 8]. Of the sums a lane has columns 2 (lane % 4) and the next of row lane / 4, and of the
// row 8 below.
__device__ __forceinline__ void multiply_add(float* sums, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
#pragma unroll
    for (int k = 0; k < 2; k++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#endif
}

// Two values as f16, the first in the low half; to nearest.
__device__ __forceinline__ u32 to_halves(float first, float second) {
#if __CUDA_ARCH__ >= 800
    u32 halves;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
    return halves;
#else
    return float_to_half(first) | (u32)float_to_half(second) << 16;
#endif
}

// What rounding two values to `high` has left, as f16.
__device__ __forceinline__ u32 rest_halves(float first, float second, u32 high) {
    return to_halves(first - half_to_float((u16)high), second - half_to_float((u16)(high >> 16)));
}

__device__ __forceinline__ u32 subtract_halves(u32 a, u32 b) {
    u32 halves;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(a), "r"(b));
    return halves;
}

__device__ __forceinline__ u32 multiply_halves(u32 a, u32 b) {
    u32 halves;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(a), "r"(b));
    return halves;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What products of a group read of a tile whose rows have ROW_BYTES (64 or 128), in pieces of 16 bytes of which `piece`
// (`gemm.cu`) says the order; the tile starts at a multiple of 8 rows.
template <int ROW_BYTES>
__device__ __forceinline__ u64 tile_descriptor(u32 address) {
    static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "orders that there are");
    // from 8 rows to the next 8; the order
    return (u64)(address >> 4 & 0x3FFF) | 1ull << 16 | (u64)(ROW_BYTES * 8 / 16) << 32 | (ROW_BYTES == 128 ? 1ull : 2ull) << 62;
}

// Makes what this thread has written to shared memory visible to products of a group, after the next barrier.
__device__ __forceinline__ void tiles_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product that is not yet ended, and after it: the sums must not be touched in between.
__device__ __forceinline__ void begin_group_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_group_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_group_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// sums [64, N] += a [64, 16] * b [16, N]; = where `add` is 0. Warp w of four has rows 16 w ... 16 w + 15, as `multiply_add` has them for every 8
// columns.
template <int N>
__device__ __forceinline__ void group_multiply_add(float* sums, u64 a, u64 b, u32 add);

template <>
__device__ __forceinline__ void group_multiply_add<32>(float* s, u64 a, u64 b, u32 add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.u32 add, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, add, 1, 1, 0, 0; }"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15])
        : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void group_multiply_add<64>(float* s, u64 a, u64 b, u32 add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.u32 add, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, add, 1, 1, 0, 0; }"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31])
        : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void group_multiply_add<128>(float* s, u64 a, u64 b, u32 add) {
    asm volatile(
        "{ .reg .pred add; setp.ne.u32 add, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, add, 1, 1, 0, 0; }"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]), "+f"(s[6]), "+f"(s[7]),
          "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]), "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]),
          "+f"(s[16]), "+f"(s[17]), "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
          "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]), "+f"(s[30]), "+f"(s[31]),
          "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]), "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]),
          "+f"(s[40]), "+f"(s[41]), "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
          "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]), "+f"(s[54]), "+f"(s[55]),
          "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]), "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63])
        : "l"(a), "l"(b), "r"(add));
}

#else

template <int ROW_BYTES>
__device__ __forceinline__ u64 tile_descriptor(u32) {
    return 0;
}
__device__ __forceinline__ void tiles_written() {}
__device__ __forceinline__ void begin_group_products() {}
__device__ __forceinline__ void end_group_products() {}
__device__ __forceinline__ void wait_for_group_products() {}
template <int N>
__device__ __forceinline__ void group_multiply_add(float*, u64, u64, u32) {}

#endif

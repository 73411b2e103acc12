// Weights that come from the host as they lie there: put in the order of rows on the device, and turned by 90 degrees where a
// product wants columns.
#include "mma.cuh"
#include "quant.cuh"

// Units of one plane: `units` of `unit_bytes` in each row.
struct UnpackPlane {
    u32 units, unit_bytes;
};

struct UnpackArgs {
    // groups of `together` rows, `from_stride` bytes apart
    const u8* from;
    u64 from_stride;
    // rows, `to_stride` bytes apart
    u8* to;
    u64 to_stride;
    u32 n_rows, together, n_planes, unused;
    UnpackPlane planes[3];
};
static_assert(sizeof(UnpackArgs) == 72, "as the launcher has it");

constexpr u32 UNPACK_THREADS = 256, UNPACK_UNITS = 128, UNPACK_ROWS = 16;

// A block has a group of rows and goes over their units, UNPACK_UNITS at a time: read in the order of the group, written in that
// of rows, padding included.
extern "C" __global__ void __launch_bounds__(UNPACK_THREADS) unpack(UnpackArgs args) {
    __shared__ u32 tile[UNPACK_ROWS][UNPACK_UNITS + 1];
    const u32 together = args.together, first_row = blockIdx.x * together;
    const u32 n_rows = min(together, args.n_rows - first_row);
    const u8* from = args.from + blockIdx.x * args.from_stride;
    wait_for_launch_before();
    u64 at = 0;
#pragma unroll 1
    for (u32 plane = 0; plane < args.n_planes; plane++) {
        const u32 units = args.planes[plane].units, bytes = args.planes[plane].unit_bytes;
        const u32 padded = (u32)padded16((u64)units * bytes) / bytes;
#pragma unroll 1
        for (u32 first = blockIdx.y * UNPACK_UNITS; first < padded; first += gridDim.y * UNPACK_UNITS) {
            const u32 here = min(padded - first, UNPACK_UNITS);
            __syncthreads();
            for (u32 i = threadIdx.x; i < here * together; i += UNPACK_THREADS) {
                const u32 unit = first + i / together, row = i % together;
                u32 value = 0;
                // not __ldg: a copy has just written it; rows alone may start at any even byte
                const u16* half = (const u16*)(from + ((u64)unit * together + row) * bytes);
                if (unit < units) value = bytes == 4 ? half[0] | (u32)half[1] << 16 : half[0];
                tile[row][i / together] = value;
            }
            __syncthreads();
            for (u32 i = threadIdx.x; i < here * n_rows; i += UNPACK_THREADS) {
                const u32 row = i / here, unit = i % here;
                u8* to = args.to + (u64)(first_row + row) * args.to_stride + at + (u64)(first + unit) * bytes;
                if (bytes == 4)
                    *(u32*)to = tile[row][unit];
                else
                    *(u16*)to = (u16)tile[row][unit];
            }
        }
        from += (u64)units * bytes * together;
        at += padded16((u64)units * bytes);
    }
    start_next_launch();
}

// Blocks of 256 values: a thread has a sub-block of 32, whose fields lie in the host's planes as in the file, and writes it as
// `quant.cuh` reads it.
struct UnpackKArgs {
    const u8* from;
    u64 from_stride;
    u8* to;
    u64 to_stride;
    // rows, those that lie together, and sub-blocks of a row
    u32 n_rows, together, n_subs;
    // 4, 5 or 6
    u32 bits;
};
static_assert(sizeof(UnpackKArgs) == 48, "as the launcher has it");

// One plane of the host: `unit` bytes of `units` in a block, for all rows of a group.
struct HostPlane {
    const u8* at;
    u32 unit, together, row;

    // Unit `n` of the row.
    __device__ __forceinline__ u32 load(u32 n) const {
        const u16* half = (const u16*)(at + ((u64)n * together + row) * unit);
        return unit == 4 ? half[0] | (u32)half[1] << 16 : half[0];
    }
    // Byte `n` of the row.
    __device__ __forceinline__ u32 byte(u32 n) const { return load(n / 4) >> (n % 4 * 8) & 0xFF; }
};

// Scale and minimum of a sub-block, 6 bits each, of the block's 12 bytes.
__device__ __forceinline__ void scale_and_min(const HostPlane& scales, u32 block, u32 sub, u8* to) {
    const u32 at = block * 12;
    if (sub < 4) {
        to[0] = scales.byte(at + sub) & 63;
        to[1] = scales.byte(at + sub + 4) & 63;
    } else {
        to[0] = (scales.byte(at + sub + 4) & 0xF) | (scales.byte(at + sub - 4) >> 6) << 4;
        to[1] = scales.byte(at + sub + 4) >> 4 | (scales.byte(at + sub) >> 6) << 4;
    }
}

extern "C" __global__ void __launch_bounds__(UNPACK_THREADS) unpack_k(UnpackKArgs args) {
    const u32 i = blockIdx.x * UNPACK_THREADS + threadIdx.x, row = i / args.n_subs, at = i % args.n_subs;
    wait_for_launch_before();
    if (row < args.n_rows) {
        const u32 block = at / 8, sub = at % 8, n_blocks = args.n_subs / 8, together = args.together;
        const u8* from = args.from + row / together * args.from_stride;
        auto plane = [&](u32 unit, u32 units) {
            HostPlane plane = {from, unit, together, row % together};
            from += (u64)n_blocks * units * unit * together;
            return plane;
        };
        const HostPlane low = plane(4, 32);
        const HostPlane high = args.bits == 5 ? plane(4, 8) : args.bits == 6 ? plane(4, 16) : HostPlane();
        const HostPlane scales = plane(4, args.bits == 6 ? 4 : 3);
        const HostPlane d = plane(2, 1), dmin = args.bits == 6 ? HostPlane() : plane(2, 1);
        u8* to = args.to + row * args.to_stride;
        // low bits: value k and value k + 16 in a byte
        u32 nibbles[4] = {};
        if (args.bits == 6) {
            const u32 first = block * 32 + sub / 4 * 16 + sub % 2 * 8, shift = sub / 2 % 2 * 4;
            for (u32 w = 0; w < 4; w++)
                nibbles[w] = (low.load(first + w) >> shift & 0x0F0F0F0F) | (low.load(first + 4 + w) >> shift & 0x0F0F0F0F) << 4;
        } else {
            const u32 first = block * 32 + sub / 2 * 8, shift = sub % 2 * 4;
            for (u32 w = 0; w < 4; w++)
                nibbles[w] = (low.load(first + w) >> shift & 0x0F0F0F0F) | (low.load(first + 4 + w) >> shift & 0x0F0F0F0F) << 4;
        }
        for (u32 w = 0; w < 4; w++) ((u32*)(to + at * 16))[w] = nibbles[w];
        to += args.n_subs * 16;
        if (args.bits == 5) {
            u32 fifth = 0;
            for (u32 k = 0; k < 32; k++) fifth |= (high.byte(block * 32 + k) >> sub & 1) << k;
            *(u32*)(to + at * 4) = fifth;
            to += args.n_subs * 4;
        }
        if (args.bits == 6) {
            const u32 shift = sub % 4 * 2;
            for (u32 half = 0; half < 2; half++) {
                const u32 first = block * 64 + sub / 4 * 32 + half * 16;
                u32 packed = 0;
                for (u32 k = 0; k < 4; k++)
                    for (u32 w = 0; w < 4; w++)
                        packed |= (high.byte(first + 4 * w + k) >> shift & 3) << (k * 8 + w * 2);
                ((u32*)(to + at * 8))[half] = packed;
            }
            to += args.n_subs * 8;
            ((u8*)to)[at * 2] = scales.byte(block * 16 + sub * 2);
            ((u8*)to)[at * 2 + 1] = scales.byte(block * 16 + sub * 2 + 1);
        } else {
            scale_and_min(scales, block, sub, to + at * 2);
        }
        to += padded16(args.n_subs * 2);
        if (sub == 0) {
            const u32 fields = args.bits == 6 ? 1 : 2;
            ((u16*)to)[block * fields] = (u16)d.load(block);
            if (fields == 2) ((u16*)to)[block * fields + 1] = (u16)dmin.load(block);
        }
        // what pads the last two planes is zeros
        if (at == 0) {
            u8* of_subs = to - padded16(args.n_subs * 2);
            for (u32 k = args.n_subs * 2; k < padded16(args.n_subs * 2); k++) of_subs[k] = 0;
            const u32 bytes = n_blocks * (args.bits == 6 ? 2 : 4);
            for (u32 k = bytes; k < padded16(bytes); k++) to[k] = 0;
        }
    }
    start_next_launch();
}

// Gates of Q4_0 in planes, as `ffn_sparse/sketch/planes.rs` has them: a thread puts a block together again.
struct UnpackPlanesArgs {
    // groups of PLANES_ROWS rows: signs, in runs of blocks
    const u8* top;
    // rows one behind the other: bits 0 and 1, bits 2, scales
    const u8* rest;
    // rows, `to_stride` bytes apart
    u8* to;
    u64 to_stride;
    u32 n_rows, n_blocks;
};
static_assert(sizeof(UnpackPlanesArgs) == 40, "as the launcher has it");

constexpr u32 PLANES_ROWS = 16, PLANES_RUN = 4, PLANES_UNIT = 8;

extern "C" __global__ void __launch_bounds__(UNPACK_THREADS) unpack_planes(UnpackPlanesArgs args) {
    const u32 n_blocks = args.n_blocks, i = blockIdx.x * UNPACK_THREADS + threadIdx.x, row = i / n_blocks, block = i % n_blocks;
    wait_for_launch_before();
    if (row < args.n_rows) {
        // not __ldg: a copy has just written it; a row starts at any even byte
        const u8* rest = args.rest + (u64)row * n_blocks * 14;
        const u16* low = (const u16*)(rest + block * 8);
        const u32 unit = block / PLANES_UNIT * PLANES_UNIT, width = min(n_blocks - unit, PLANES_UNIT);
        const u8* high = rest + n_blocks * 8 + unit * 4 + block - unit;
        const u16 scale = *(const u16*)(rest + n_blocks * 12 + block * 2);
        // of a row's last blocks two are a run, and one
        const u32 whole = n_blocks / PLANES_RUN * PLANES_RUN;
        u32 first = block / PLANES_RUN * PLANES_RUN, run = PLANES_RUN;
        if (block >= whole) {
            const bool two = n_blocks - whole >= 2 && block < whole + 2;
            first = two ? whole : n_blocks - 1;
            run = two ? 2 : 1;
        }
        const u8* signs_at = args.top + (row / PLANES_ROWS * (u64)n_blocks + first) * PLANES_ROWS * 4;
        const u32 signs = *(const u32*)(signs_at + (row % PLANES_ROWS * run + block - first) * 4);
        u32 words[4] = {};
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            // columns j, 8 + j, 16 + j, 24 + j
            const u32 bits = low[j / 2] >> j % 2 * 8;
            u32 q[4];
#pragma unroll
            for (u32 p = 0; p < 4; p++)
                q[p] = (bits >> 2 * p & 3) | (high[p * width] >> j & 1) << 2 | (signs >> (8 * p + j) & 1) << 3;
            words[j / 4] |= (q[0] | q[2] << 4) << j % 4 * 8;
            words[2 + j / 4] |= (q[1] | q[3] << 4) << j % 4 * 8;
        }
        // where the scale is negative they hold 15 - q
        const u32 flip = scale >> 15 ? ALL_LANES : 0;
        u8* to = args.to + row * args.to_stride;
        *(uint4*)(to + block * 16) = make_uint4(words[0] ^ flip, words[1] ^ flip, words[2] ^ flip, words[3] ^ flip);
        u16* scales = (u16*)(to + n_blocks * 16);
        scales[block] = scale;
        if (block == n_blocks - 1)
            for (u32 k = n_blocks; k < padded16(n_blocks * 2) / 2; k++) scales[k] = 0;
    }
    start_next_launch();
}

struct TransposeArgs {
    // [n_rows] rows of the format, `stride` bytes apart
    const u8* rows;
    u64 stride;
    // [n_cols] rows of n_rows f16 or f32, `to_stride` bytes apart
    u8* to;
    u64 to_stride;
    u32 n_rows, n_cols;
};
static_assert(sizeof(TransposeArgs) == 40, "as the launcher has it");

constexpr u32 TRANSPOSE_THREADS = 256, TRANSPOSE_ROWS = 64, TRANSPOSE_COLUMNS = 128;

// A block has a tile of rows and columns. What pads a row of the output is zeros.
template <class Q>
__device__ __forceinline__ void transpose(const TransposeArgs& args, bool halves) {
    __shared__ float tile[TRANSPOSE_COLUMNS][TRANSPOSE_ROWS + 1];
    constexpr u32 VALUES = Q::PARTS * Q::PART, ITEMS = TRANSPOSE_COLUMNS / VALUES;
    const u32 first_row = blockIdx.x * TRANSPOSE_ROWS, first_column = blockIdx.y * TRANSPOSE_COLUMNS;
    wait_for_launch_before();
    for (u32 i = threadIdx.x; i < TRANSPOSE_ROWS * ITEMS; i += TRANSPOSE_THREADS) {
        const u32 row = i / ITEMS, of_row = i % ITEMS, at = first_column / VALUES + of_row;
        const bool is_there = first_row + row < args.n_rows && at < Q::items(args.n_cols);
        Q item = Q();
        if (is_there) item.load(args.rows + (u64)(first_row + row) * args.stride, args.n_cols, at);
#pragma unroll
        for (int part = 0; part < Q::PARTS; part++) {
            float values[Q::PART];
            part_values(item, at, part, values);
#pragma unroll
            for (int k = 0; k < Q::PART; k++)
                tile[of_row * VALUES + part * Q::PART + k][row] = is_there ? values[k] : 0.0f;
        }
    }
    __syncthreads();
    const u32 pairs = TRANSPOSE_ROWS / 2;
    const u32 padded = halves ? (u32)padded16(args.n_rows * 2) / 2 : (u32)padded16(args.n_rows * 4) / 4;
    for (u32 i = threadIdx.x; i < TRANSPOSE_COLUMNS * pairs; i += TRANSPOSE_THREADS) {
        const u32 column = i / pairs, row = i % pairs * 2;
        if (first_column + column >= args.n_cols || first_row + row >= padded) continue;
        u8* to = args.to + (u64)(first_column + column) * args.to_stride;
        const float first = tile[column][row], second = tile[column][row + 1];
        if (halves)
            *(u32*)(to + (u64)(first_row + row) * 2) = to_halves(first, second);
        else
            *(float2*)(to + (u64)(first_row + row) * 4) = make_float2(first, second);
    }
    start_next_launch();
}

#define TRANSPOSE(Q)                                                                                         \
    extern "C" __global__ void __launch_bounds__(TRANSPOSE_THREADS) transpose_f16_##Q(TransposeArgs args) { \
        transpose<Q>(args, true);                                                                            \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(TRANSPOSE_THREADS) transpose_f32_##Q(TransposeArgs args) { \
        transpose<Q>(args, false);                                                                           \
    }

TRANSPOSE(F32)
TRANSPOSE(F16)
TRANSPOSE(BF16)
TRANSPOSE(Q4_0)
TRANSPOSE(Q4_1)
TRANSPOSE(Q5_0)
TRANSPOSE(Q8_0)
TRANSPOSE(Q4_K)
TRANSPOSE(Q5_K)
TRANSPOSE(Q6_K)

// For tests: what a defect of the device looks like to a run.
extern "C" __global__ void trap() { asm volatile("trap;"); }

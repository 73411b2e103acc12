// Weight formats as rows lie on the device: a block's fields are planes, values first, each plane padded to 16 bytes (`layout.rs`,
// `DeviceRows`). A lane takes one *item* of a row at a time: what 16-byte loads bring. An item of a quantised format has
// PARTS parts of PART consecutive columns with one scale (and minimum) each; value = scale * (byte - OFFSET) + min.
#pragma once
#include "common.cuh"

// An item's 16 bytes; not ONCE where little of a row is read at a time, and what lies behind it soon after: then the second
// cache fetches more at once.
template <bool ONCE>
__device__ __forceinline__ uint4 load_item(const u8* at) {
    return ONCE ? load16_once(at) : load16_and_behind(at);
}

// Low and high nibbles of 16 bytes, as bytes.
__device__ __forceinline__ void low_nibbles(uint4 q, u32* bytes) {
    bytes[0] = q.x & 0x0F0F0F0F;
    bytes[1] = q.y & 0x0F0F0F0F;
    bytes[2] = q.z & 0x0F0F0F0F;
    bytes[3] = q.w & 0x0F0F0F0F;
}

__device__ __forceinline__ void high_nibbles(uint4 q, u32* bytes) {
    bytes[0] = (q.x >> 4) & 0x0F0F0F0F;
    bytes[1] = (q.y >> 4) & 0x0F0F0F0F;
    bytes[2] = (q.z >> 4) & 0x0F0F0F0F;
    bytes[3] = (q.w >> 4) & 0x0F0F0F0F;
}

struct Q4_0 {
    static constexpr bool QUANTISED = true, SIGNED = false, HAS_MIN = false;
    static constexpr int PARTS = 1, PART = 32, OFFSET = 8, TOGETHER = 4;
    uint4 q;
    u16 d;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return n_cols / 32; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32 n_cols, u32 item) {
        u32 n = n_cols / 32;
        q = load_item<ONCE>(row + item * 16);
        d = load2(row + n * 16 + item * 2);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 32; }
    __device__ __forceinline__ void bytes(int, u32* p) const {
        low_nibbles(q, p);
        high_nibbles(q, p + 4);
    }
    __device__ __forceinline__ float scale(u32, int) const { return half_to_float(d); }
    __device__ __forceinline__ float min(u32, int) const { return 0.0f; }
};

struct Q4_1 {
    static constexpr bool QUANTISED = true, SIGNED = false, HAS_MIN = true;
    static constexpr int PARTS = 1, PART = 32, OFFSET = 0, TOGETHER = 4;
    uint4 q;
    u16 d, m;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return n_cols / 32; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32 n_cols, u32 item) {
        u32 n = n_cols / 32;
        q = load_item<ONCE>(row + item * 16);
        const u8* scales = row + n * 16;
        d = load2(scales + item * 2);
        m = load2(scales + padded16(n * 2) + item * 2);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 32; }
    __device__ __forceinline__ void bytes(int, u32* p) const {
        low_nibbles(q, p);
        high_nibbles(q, p + 4);
    }
    __device__ __forceinline__ float scale(u32, int) const { return half_to_float(d); }
    __device__ __forceinline__ float min(u32, int) const { return half_to_float(m); }
};

// Four bits spread over the fifth bits of four bytes.
__device__ __forceinline__ u32 fifth_bits(u32 bits) {
    return ((bits & 1) << 4) | ((bits & 2) << 11) | ((bits & 4) << 18) | ((bits & 8) << 25);
}

struct Q5_0 {
    static constexpr bool QUANTISED = true, SIGNED = false, HAS_MIN = false;
    static constexpr int PARTS = 1, PART = 32, OFFSET = 16, TOGETHER = 4;
    uint4 q;
    u32 high;
    u16 d;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return n_cols / 32; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32 n_cols, u32 item) {
        u32 n = n_cols / 32;
        q = load_item<ONCE>(row + item * 16);
        high = load4(row + n * 16 + item * 4);
        d = load2(row + n * 16 + padded16(n * 4) + item * 2);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 32; }
    __device__ __forceinline__ void bytes(int, u32* p) const {
        low_nibbles(q, p);
        high_nibbles(q, p + 4);
#pragma unroll
        for (int k = 0; k < 8; k++) p[k] |= fifth_bits(high >> (4 * k));
    }
    __device__ __forceinline__ float scale(u32, int) const { return half_to_float(d); }
    __device__ __forceinline__ float min(u32, int) const { return 0.0f; }
};

struct Q8_0 {
    static constexpr bool QUANTISED = true, SIGNED = true, HAS_MIN = false;
    static constexpr int PARTS = 1, PART = 16, OFFSET = 128, TOGETHER = 4;
    uint4 q;
    u16 d;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return n_cols / 16; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32 n_cols, u32 item) {
        q = load_item<ONCE>(row + item * 16);
        d = load2(row + n_cols + item / 2 * 2);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 16; }
    // signed; OFFSET is for those who take them as unsigned
    __device__ __forceinline__ void bytes(int, u32* p) const {
        p[0] = q.x;
        p[1] = q.y;
        p[2] = q.z;
        p[3] = q.w;
    }
    __device__ __forceinline__ float scale(u32, int) const { return half_to_float(d); }
    __device__ __forceinline__ float min(u32, int) const { return 0.0f; }
};

// The formats with blocks of 256 lie as eight sub-blocks of 32 each, which are ordered like blocks of Q4_0, with scales of whole
// bytes (`layout.rs`, `DeviceRows`). An item is a sub-block.
struct Q4_K {
    static constexpr bool QUANTISED = true, SIGNED = false, HAS_MIN = true;
    static constexpr int PARTS = 1, PART = 32, OFFSET = 0, TOGETHER = 4;
    uint4 q;
    // scale and minimum of the sub-block, a byte each
    u16 sub;
    // d and dmin
    u32 floats;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return n_cols / 32; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32 n_cols, u32 item) {
        u32 n = n_cols / 256;
        q = load_item<ONCE>(row + item * 16);
        const u8* subs = row + n * 128;
        sub = load2(subs + item * 2);
        floats = load4(subs + n * 16 + item / 8 * 4);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 32; }
    __device__ __forceinline__ void bytes(int, u32* p) const {
        low_nibbles(q, p);
        high_nibbles(q, p + 4);
    }
    __device__ __forceinline__ float scale(u32, int) const { return half_to_float((u16)floats) * (float)(sub & 0xFF); }
    __device__ __forceinline__ float min(u32, int) const {
        return -half_to_float((u16)(floats >> 16)) * (float)(sub >> 8);
    }
};

struct Q5_K {
    static constexpr bool QUANTISED = true, SIGNED = false, HAS_MIN = true;
    static constexpr int PARTS = 1, PART = 32, OFFSET = 0, TOGETHER = 4;
    uint4 q;
    u32 high;
    u16 sub;
    u32 floats;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return n_cols / 32; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32 n_cols, u32 item) {
        u32 n = n_cols / 256;
        q = load_item<ONCE>(row + item * 16);
        high = load4(row + n * 128 + item * 4);
        const u8* subs = row + n * 160;
        sub = load2(subs + item * 2);
        floats = load4(subs + n * 16 + item / 8 * 4);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 32; }
    __device__ __forceinline__ void bytes(int, u32* p) const {
        low_nibbles(q, p);
        high_nibbles(q, p + 4);
#pragma unroll
        for (int k = 0; k < 8; k++) p[k] |= fifth_bits(high >> (4 * k));
    }
    __device__ __forceinline__ float scale(u32, int) const { return half_to_float((u16)floats) * (float)(sub & 0xFF); }
    __device__ __forceinline__ float min(u32, int) const {
        return -half_to_float((u16)(floats >> 16)) * (float)(sub >> 8);
    }
};

// Both halves of a sub-block have a scale of their own.
struct Q6_K {
    static constexpr bool QUANTISED = true, SIGNED = false, HAS_MIN = false;
    static constexpr int PARTS = 2, PART = 16, OFFSET = 32, TOGETHER = 4;
    uint4 q;
    // bits 2 w and 2 w + 1 of byte k: the high bits of value 4 w + k of a half
    uint2 high;
    // a signed byte each
    u16 sub;
    u16 d;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return n_cols / 32; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32 n_cols, u32 item) {
        u32 n = n_cols / 256;
        q = load_item<ONCE>(row + item * 16);
        high = __ldg((const uint2*)(row + n * 128 + item * 8));
        sub = load2(row + n * 192 + item * 2);
        d = load2(row + n * 208 + item / 8 * 2);
    }
    static __device__ __forceinline__ u32 column(u32 item, int part) { return item * 32 + part * 16; }
    __device__ __forceinline__ void bytes(int part, u32* p) const {
        if (part == 0)
            low_nibbles(q, p);
        else
            high_nibbles(q, p);
        u32 bits = part == 0 ? high.x : high.y;
        p[0] |= (bits << 4) & 0x30303030;
        p[1] |= (bits << 2) & 0x30303030;
        p[2] |= bits & 0x30303030;
        p[3] |= (bits >> 2) & 0x30303030;
    }
    __device__ __forceinline__ float scale(u32, int part) const {
        return half_to_float(d) * (float)(i8)(part == 0 ? sub : sub >> 8);
    }
    __device__ __forceinline__ float min(u32, int) const { return 0.0f; }
};

// Float formats: an item is 16 bytes; rows are padded with zeros to whole items.
struct F32 {
    static constexpr bool QUANTISED = false, HAS_MIN = false;
    static constexpr int PARTS = 1, PART = 4, TOGETHER = 4;
    uint4 q;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return (n_cols + 3) / 4; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32, u32 item) {
        q = load_item<ONCE>(row + item * 16);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 4; }
    __device__ __forceinline__ void floats(float* w) const {
        w[0] = __uint_as_float(q.x);
        w[1] = __uint_as_float(q.y);
        w[2] = __uint_as_float(q.z);
        w[3] = __uint_as_float(q.w);
    }
};

struct F16 {
    static constexpr bool QUANTISED = false, HAS_MIN = false;
    static constexpr int PARTS = 1, PART = 8, TOGETHER = 4;
    uint4 q;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return (n_cols + 7) / 8; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32, u32 item) {
        q = load_item<ONCE>(row + item * 16);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 8; }
    __device__ __forceinline__ void floats(float* w) const {
        u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            w[2 * k] = half_to_float((u16)words[k]);
            w[2 * k + 1] = half_to_float((u16)(words[k] >> 16));
        }
    }
};

struct BF16 {
    static constexpr bool QUANTISED = false, HAS_MIN = false;
    static constexpr int PARTS = 1, PART = 8, TOGETHER = 4;
    uint4 q;

    static __device__ __forceinline__ u32 items(u32 n_cols) { return (n_cols + 7) / 8; }
    template <bool ONCE = true>
    __device__ __forceinline__ void load(const u8* row, u32, u32 item) {
        q = load_item<ONCE>(row + item * 16);
    }
    static __device__ __forceinline__ u32 column(u32 item, int) { return item * 8; }
    __device__ __forceinline__ void floats(float* w) const {
        u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            w[2 * k] = __uint_as_float(words[k] << 16);
            w[2 * k + 1] = __uint_as_float(words[k] & 0xFFFF0000u);
        }
    }
};

// The integers of a part as f32, offset taken off.
template <class Q>
__device__ __forceinline__ void part_integers(const Q& item, int part, float* values) {
    u32 p[Q::PART / 4];
    item.bytes(part, p);
#pragma unroll
    for (int k = 0; k < Q::PART / 4; k++) {
        u32 bytes = Q::SIGNED ? p[k] ^ 0x80808080 : p[k];
        values[4 * k] = byte_to_float<0>(bytes, Q::OFFSET);
        values[4 * k + 1] = byte_to_float<1>(bytes, Q::OFFSET);
        values[4 * k + 2] = byte_to_float<2>(bytes, Q::OFFSET);
        values[4 * k + 3] = byte_to_float<3>(bytes, Q::OFFSET);
    }
}

// The real values of a part, as `DecodedBlock::value` has them.
template <class Q>
__device__ __forceinline__ void part_values(const Q& item, u32 at, int part, float* values) {
    if constexpr (Q::QUANTISED) {
        part_integers(item, part, values);
        float scale = item.scale(at, part), min = item.min(at, part);
#pragma unroll
        for (int k = 0; k < Q::PART; k++)
            values[k] = Q::HAS_MIN ? fmaf(values[k], scale, min) : __fmul_rn(values[k], scale);
    } else {
        item.floats(values);
    }
}

// acc + the item's products with 8-bit activations: integers are summed exactly over a part.
template <class Q>
__device__ __forceinline__ float add_item_q8(const Q& item, u32 at, const Act& x, float acc) {
#pragma unroll
    for (int part = 0; part < Q::PARTS; part++) {
        u32 p[Q::PART / 4];
        item.bytes(part, p);
        u32 half = Q::column(at, part) / 16;
        int sum = 0;
#pragma unroll
        for (int k = 0; k < Q::PART / 16; k++) {
            uint4 q = x.q16(half + k);
            u32 words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int j = 0; j < 4; j++)
                sum = Q::SIGNED ? dot4_signed(p[4 * k + j], words[j], sum) : dot4_unsigned(p[4 * k + j], words[j], sum);
        }
        int4 meta = x.meta[half / 2];
        int total = Q::PART == 32 ? meta.y + meta.z : (half & 1 ? meta.z : meta.y);
        if (!Q::SIGNED && Q::OFFSET != 0) sum -= Q::OFFSET * total;
        float x_scale = __int_as_float(meta.x);
        acc = fmaf((float)sum, __fmul_rn(item.scale(at, part), x_scale), acc);
        if (Q::HAS_MIN) acc = fmaf(item.min(at, part), __fmul_rn(x_scale, (float)total), acc);
    }
    return acc;
}

// acc + the item's products with f32 activations.
template <class Q>
__device__ __forceinline__ float add_item_f32(const Q& item, u32 at, const Act& x, float acc) {
    if constexpr (Q::QUANTISED) {
#pragma unroll
        for (int part = 0; part < Q::PARTS; part++) {
            float w[Q::PART];
            part_integers(item, part, w);
            u32 column = Q::column(at, part);
            float4 sum = {0, 0, 0, 0}, total = {0, 0, 0, 0};
#pragma unroll
            for (int k = 0; k < Q::PART / 4; k++) {
                float4 v = x.quad(column / 32, column % 32 / 4 + k);
                sum.x = fmaf(w[4 * k], v.x, sum.x);
                sum.y = fmaf(w[4 * k + 1], v.y, sum.y);
                sum.z = fmaf(w[4 * k + 2], v.z, sum.z);
                sum.w = fmaf(w[4 * k + 3], v.w, sum.w);
                if (Q::HAS_MIN) {
                    total.x += v.x;
                    total.y += v.y;
                    total.z += v.z;
                    total.w += v.w;
                }
            }
            acc = fmaf((sum.x + sum.z) + (sum.y + sum.w), item.scale(at, part), acc);
            if (Q::HAS_MIN) acc = fmaf((total.x + total.z) + (total.y + total.w), item.min(at, part), acc);
        }
    } else {
        float w[Q::PART];
        item.floats(w);
        const float4* v = (const float4*)(x.values + at * Q::PART);
#pragma unroll
        for (int k = 0; k < Q::PART / 4; k++) {
            float4 quad = v[k];
            acc = fmaf(w[4 * k], quad.x, acc);
            acc = fmaf(w[4 * k + 1], quad.y, acc);
            acc = fmaf(w[4 * k + 2], quad.z, acc);
            acc = fmaf(w[4 * k + 3], quad.w, acc);
        }
    }
    return acc;
}

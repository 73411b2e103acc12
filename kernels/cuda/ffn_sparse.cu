// The second half of the feed-forward network over a list of neurons: the sum of their down rows, of which those whose factor
// is zero can be left unread. (The first half is in rows.cu.) No sum depends on which block is first.
#include "quant.cuh"
#include "then_norm.cuh"

// What the blocks of one part of the columns know of each other.
struct DownCounts {
    // blocks that have started; warps that join a slice or have none, and DOWN_LEFT << slice for each that is left
    u32 started, ended;
};

struct DownArgs {
    // [n_neurons] rows, `stride` bytes apart
    const u8* rows;
    u64 stride;
    // [*n_ids] u32 in ascending order; all neurons where `n_ids` is null
    const u32* ids;
    const u32* n_ids;
    u32 n_neurons;
    // places of `ids` and `a`
    u32 n_a;
    u32 n_cols;
    // [n_a] f32, by place in the list
    const float* a;
    // [n_cols] f32 or null: added to the sums; may be `out`
    const float* add;
    // [n_cols] f32
    float* out;
    // [gridDim.x, gridDim.y, 8 * values of an item] f32, all NOT_YET
    u32* partials;
    // [gridDim.x], zeros
    DownCounts* counts;
    // whether rows whose factor is zero are left unread
    u32 skip;
    // of the results
    ThenNorm then;
};
static_assert(sizeof(DownArgs) == 216, "as the launcher has it");

// What is no part of a sum yet: a NaN that none is.
constexpr u32 NOT_YET = 0xFFFFFFFF;

// Two blocks fill a multiprocessor.
constexpr u32 DOWN_WARPS = 8;
constexpr u32 DOWN_ROUNDS = 4;
// Places that a block looks through at a time.
constexpr u32 DOWN_LIST = DOWN_ROUNDS * DOWN_WARPS * WARP;

// Neurons of a part of the list that are added, in the list's order.
struct DownList {
    u32 ids[DOWN_LIST];
    float a[DOWN_LIST];
    u32 counts[DOWN_LIST / WARP];
    u32 n;
};

// Places of a block: runs of WARP, `step` runs apart.
struct DownPlaces {
    u32 begin, end, step, n_runs;

    // Lists of which rows are left unread are divided evenly. Of all neurons a block has every gridDim.y-th run, because those that
    // fire often lie together.
    __device__ __forceinline__ DownPlaces(bool is_list, u32 n) {
        // fits: a list has fewer than 2^20 places, a column fewer than 2^12 blocks
        begin = is_list ? n * blockIdx.y / gridDim.y : blockIdx.y * WARP;
        end = is_list ? n * (blockIdx.y + 1) / gridDim.y : n;
        step = is_list ? 1 : gridDim.y;
        n_runs = end > begin ? ((end - begin + WARP - 1) / WARP + step - 1) / step : 0;
    }
};

// Fills `list` from the places, from run `first` on. Called by the whole block; synchronises before and after.
__device__ __forceinline__ void find_active(const DownArgs& args, const DownPlaces& places, u32 first, DownList& list) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float a[DOWN_ROUNDS];
    u32 ids[DOWN_ROUNDS], before[DOWN_ROUNDS];
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < DOWN_ROUNDS; r++) {
        u32 j = places.begin + (first + r * DOWN_WARPS + warp) * places.step * WARP + lane;
        a[r] = j < places.end ? args.a[j] : 0.0f;
        ids[r] = args.n_ids == nullptr || j >= places.end ? j : load_written(args.ids + j);
        u32 active = __ballot_sync(ALL_LANES, j < places.end && (a[r] != 0.0f || !args.skip));
        before[r] = __popc(active & ((1u << lane) - 1));
        if (lane == 0) list.counts[r * DOWN_WARPS + warp] = __popc(active);
    }
    __syncthreads();
    if (warp == 0) {
        // counts become starts
        u32 counts[DOWN_ROUNDS], count = 0;
#pragma unroll
        for (u32 r = 0; r < DOWN_ROUNDS; r++) {
            counts[r] = lane < DOWN_WARPS ? list.counts[lane * DOWN_ROUNDS + r] : 0;
            count += counts[r];
        }
        u32 start = count;
#pragma unroll
        for (u32 step = 1; step < WARP; step *= 2) {
            u32 other = __shfl_up_sync(ALL_LANES, start, step);
            if (lane >= step) start += other;
        }
        if (lane == WARP - 1) list.n = start;
        start -= count;
#pragma unroll
        for (u32 r = 0; r < DOWN_ROUNDS; r++) {
            if (lane < DOWN_WARPS) list.counts[lane * DOWN_ROUNDS + r] = start;
            start += counts[r];
        }
    }
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < DOWN_ROUNDS; r++) {
        u32 j = places.begin + (first + r * DOWN_WARPS + warp) * places.step * WARP + lane;
        if (j < places.end && (a[r] != 0.0f || !args.skip)) {
            u32 at = list.counts[r * DOWN_WARPS + warp] + before[r];
            list.ids[at] = ids[r];
            list.a[at] = a[r];
        }
    }
    __syncthreads();
}
static_assert(DOWN_WARPS <= WARP, "a lane for each warp's counts");

// Items of a row that a block has, and neurons that a warp takes at a time.
constexpr u32 DOWN_ITEMS = 8;
constexpr u32 DOWN_GROUPS = WARP / DOWN_ITEMS;
static_assert(DOWN_GROUPS == 4, "two steps join them");
// Neurons of a group that are under way at a time; and how many are taken at once where there are no more.
constexpr int DOWN_TOGETHER = 4, DOWN_FEW = 6;
// Blocks' parts that a thread asks for before it adds the first.
constexpr u32 DOWN_JOINED = 16;
// How often a warp looks whether all blocks have started.
constexpr u32 DOWN_LOOKS = 32;
// Unit of the bits of slices that are left, beside the count of warps.
constexpr u32 DOWN_LEFT = 1 << 16;

// Adds to this lane's values those of the lane STEP away: each of the two is left with N of them, the lower one with the first ones.
template <int STEP, int N, int VALUES>
__device__ __forceinline__ void join_lanes(float (&acc)[VALUES]) {
    const bool upper = threadIdx.x & STEP;
#pragma unroll
    for (int v = 0; v < N; v++) {
        const float other = __shfl_xor_sync(ALL_LANES, upper ? acc[v] : acc[v + N], STEP);
        acc[v] = (upper ? acc[v + N] : acc[v]) + other;
    }
}

// Neurons of a block that are all read, which are known before the launch before this one has ended: of all of them.
struct DownAll {
    const DownArgs& args;
    const DownPlaces places;

    __device__ __forceinline__ DownAll(const DownArgs& args) : args(args), places(false, args.n_neurons) {}
    __device__ __forceinline__ u32 n() const { return places.n_runs * WARP; }
    __device__ __forceinline__ u32 place(u32 k) const { return places.begin + k / WARP * places.step * WARP + k % WARP; }
    __device__ __forceinline__ bool has(u32 k) const { return k < n() && place(k) < places.end; }
    __device__ __forceinline__ u32 id(u32 k) const { return place(k); }
    __device__ __forceinline__ float a(u32 k) const { return args.a[place(k)]; }
};

// Of a list: every gridDim.y-th place, so that which these are does not depend on the list's length.
struct DownOfList {
    const DownArgs& args;
    const u32 count;

    __device__ __forceinline__ DownOfList(const DownArgs& args, u32 n)
        : args(args), count(n > blockIdx.y ? (n - blockIdx.y + gridDim.y - 1) / gridDim.y : 0) {}
    static __device__ __forceinline__ u32 place(u32 k) { return k * gridDim.y + blockIdx.y; }
    __device__ __forceinline__ u32 n() const { return count; }
    __device__ __forceinline__ bool has(u32 k) const { return k < count; }
    __device__ __forceinline__ u32 id(u32 k) const { return load_written(args.ids + place(k)); }
    __device__ __forceinline__ float a(u32 k) const { return args.a[place(k)]; }
};

// Those of a list that was made.
struct DownListed {
    const DownList& list;

    __device__ __forceinline__ u32 n() const { return list.n; }
    __device__ __forceinline__ u32 id(u32 k) const { return list.ids[k]; }
    __device__ __forceinline__ bool has(u32 k) const { return k < list.n; }
    __device__ __forceinline__ float a(u32 k) const { return list.a[k]; }
};

// Sums over neurons of one item of their rows. A group of 8 lanes has an item each of one neuron; group g of warp w takes neurons
// 4 w + g, 4 w + g + 32, .... As many are under way at a time.
template <class Q, int TOGETHER>
struct DownSums {
    static constexpr int VALUES = Q::PARTS * Q::PART;
    static constexpr u32 STEP = DOWN_WARPS * DOWN_GROUPS;
    const DownArgs& args;
    const u32 item, first;
    const bool exists;
    float (&acc)[VALUES];
    u32 ids[TOGETHER];
    Q next[TOGETHER];
    float next_a[TOGETHER];

    __device__ __forceinline__ DownSums(const DownArgs& args, float (&acc)[VALUES])
        : args(args), item(blockIdx.x * DOWN_ITEMS + threadIdx.x % DOWN_ITEMS), first(threadIdx.x / DOWN_ITEMS),
          exists(item < Q::items(args.n_cols)), acc(acc) {}

    // All ids are asked for before the first item. Of a neuron that does not exist the first row is taken, times NaN.
    template <class Neurons>
    __device__ __forceinline__ void load_items(const Neurons& neurons, u32 k) {
        load_ids(neurons, k);
        load_rows(neurons, k);
    }

    template <class Neurons>
    __device__ __forceinline__ void load_ids(const Neurons& neurons, u32 k) {
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) ids[t] = neurons.has(k + t * STEP) ? neurons.id(k + t * STEP) : 0;
    }

    // Where the ids are there.
    template <class Neurons>
    __device__ __forceinline__ void load_rows(const Neurons& neurons, u32 k) {
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            if (exists && neurons.has(k + t * STEP))
                next[t].load(args.rows + (ids[t] < args.n_neurons ? ids[t] : 0) * args.stride, args.n_cols, item);
    }

    // Behind `load_items`.
    template <class Neurons>
    __device__ __forceinline__ void load_a(const Neurons& neurons, u32 k) {
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
            next_a[t] = !neurons.has(k + t * STEP) ? 0.0f : ids[t] < args.n_neurons ? neurons.a(k + t * STEP) : not_a_number();
    }

    // When the first step's items and factors have been asked for: whole steps, where ids need not be asked for.
    template <class Neurons>
    __device__ __forceinline__ void add_steps(const Neurons& neurons) {
        if (!exists) return;
#pragma unroll 1
        for (u32 k = first; k < neurons.n(); k += STEP * TOGETHER) {
            Q items[TOGETHER];
            float a[TOGETHER];
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) items[t] = next[t], a[t] = next_a[t];
            load_items(neurons, k + STEP * TOGETHER);
            load_a(neurons, k + STEP * TOGETHER);
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                if (!neurons.has(k + t * STEP)) break;
                add_item(items[t], a[t]);
            }
        }
    }

    // The same, one by one.
    template <class Neurons>
    __device__ __forceinline__ void add(const Neurons& neurons) {
        if (!exists) return;
        load_ids(neurons, first + STEP * TOGETHER);
#pragma unroll 1
        for (u32 k = first; k < neurons.n(); k += STEP * TOGETHER)
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                // each is asked for as soon as there is room, so that as many are under way all the time, and its id so many before
                const u32 at = k + t * STEP, behind = at + STEP * TOGETHER;
                const Q item = next[t];
                const float a = next_a[t];
                if (neurons.has(behind)) {
                    const bool is = ids[t] < args.n_neurons;
                    next[t].load(args.rows + (is ? ids[t] : 0) * args.stride, args.n_cols, this->item);
                    next_a[t] = is ? neurons.a(behind) : not_a_number();
                }
                if (neurons.has(behind + STEP * TOGETHER)) ids[t] = neurons.id(behind + STEP * TOGETHER);
                if (neurons.has(at)) add_item(item, a);
            }
    }

    // The same, where there are none behind the first step's.
    template <class Neurons>
    __device__ __forceinline__ void add_first(const Neurons& neurons) {
        if (!exists) return;
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            if (!neurons.has(first + t * STEP)) break;
            add_item(next[t], next_a[t]);
        }
    }

    __device__ __forceinline__ void add_item(const Q& of_row, float a) {
#pragma unroll
        for (int part = 0; part < Q::PARTS; part++) {
            float w[Q::PART];
            if constexpr (Q::QUANTISED && !Q::HAS_MIN) {
                part_integers(of_row, part, w);
                const float scale = a * of_row.scale(item, part);
#pragma unroll
                for (int v = 0; v < Q::PART; v++) acc[part * Q::PART + v] = fmaf(w[v], scale, acc[part * Q::PART + v]);
            } else {
                // scaled value and minimum may nearly cancel: their sum is taken first
                part_values(of_row, item, part, w);
#pragma unroll
                for (int v = 0; v < Q::PART; v++) acc[v] = fmaf(w[v], a, acc[v]);
            }
        }
    }
};

// The sum of the parts of column `at` of a tile of SIZE, in ascending order of their blocks. Waits until each is there, and leaves memory as it was.
template <u32 SIZE>
__device__ __forceinline__ float sum_of_parts(u32* tile, u32 at) {
    float sum = 0.0f;
#pragma unroll 1
    for (u32 first = 0; first < gridDim.y; first += DOWN_JOINED) {
        u32 parts[DOWN_JOINED];
#pragma unroll
        for (u32 k = 0; k < DOWN_JOINED; k++) parts[k] = NOT_YET;
        for (bool all = false; !all;) {
#pragma unroll
            for (u32 k = 0; k < DOWN_JOINED; k++)
                if (parts[k] == NOT_YET) parts[k] = first + k < gridDim.y ? load_relaxed(tile + (first + k) * SIZE + at) : 0;
            all = true;
#pragma unroll
            for (u32 k = 0; k < DOWN_JOINED; k++) all = all && parts[k] != NOT_YET;
        }
#pragma unroll
        for (u32 k = 0; k < DOWN_JOINED; k++) {
            if (first + k < gridDim.y) store_relaxed(tile + (first + k) * SIZE + at, NOT_YET);
            sum += __uint_as_float(parts[k]);
        }
    }
    return sum;
}

// Gives this block's part of column `at` of a tile of SIZE, and calls `done` with whole columns and their sums, 32 neighbouring ones a warp.
//
// Warps of all blocks have a slice each, for which they wait: but for blocks that have started alone, which end whatever others do. A
// warp that did not see that all have (nothing warrants that there is room for all at a time) leaves its slice to that which counts last.
// No sum depends on who joins it.
template <u32 SIZE, class Done>
__device__ __forceinline__ void join_parts(u32* tile, u32 at, DownCounts* counts, u32 started, float part, const Done& done) {
    constexpr u32 SLICES = SIZE / WARP;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (at < SIZE)
        // the part itself says that it is there: a flag would have to come behind it
        store_relaxed(tile + blockIdx.y * SIZE + at, part == part ? __float_as_uint(part) : __float_as_uint(not_a_number()));
    const bool has_slice = warp < SLICES && warp % gridDim.y == blockIdx.y;
    if (!has_slice && (warp != 0 || blockIdx.y < SLICES)) return;
    if (has_slice)
        for (u32 looks = 0; started != gridDim.y && looks < DOWN_LOOKS; looks++) started = load_relaxed(&counts->started);
    const bool waits = has_slice && started == gridDim.y;
    u32 before = 0;
    if (lane == 0) before = atomicAdd(&counts->ended, 1u + (has_slice && !waits ? DOWN_LEFT << warp : 0));
    if (waits) done(at, sum_of_parts<SIZE>(tile, at));
    before = __shfl_sync(ALL_LANES, before, 0);
    if (before % DOWN_LEFT + 1 != max(gridDim.y, SLICES)) return;
    if (lane == 0) *counts = DownCounts{0, 0};
    u32 left = before / DOWN_LEFT | (has_slice && !waits ? 1u << warp : 0);
    for (; left != 0; left &= left - 1) {
        const u32 other = (__ffs(left) - 1) * WARP + lane;
        done(other, sum_of_parts<SIZE>(tile, other));
    }
}

// Block (x, y): items 8 x ... 8 x + 7 of the rows of part y of the list. Groups of lanes are joined, then warps in ascending order,
// then the blocks of a column in ascending order.
template <class Q>
__device__ __forceinline__ void down(const DownArgs& args) {
    constexpr int VALUES = Q::PARTS * Q::PART;
    constexpr u32 TILE = VALUES * DOWN_ITEMS;
    __shared__ DownList list;
    __shared__ float sums[DOWN_WARPS][TILE];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float acc[VALUES];
#pragma unroll
    for (int v = 0; v < VALUES; v++) acc[v] = 0.0f;
    DownSums<Q, DOWN_TOGETHER> own(args, acc);
    DownSums<Q, DOWN_FEW> of_few(args, acc);
    // what is added to a column's sum, and where it is in a tile
    const auto column_of = [&](u32 at) {
        const u32 of_item = blockIdx.x * DOWN_ITEMS + at / VALUES, of_value = at % VALUES;
        const bool exists = at < TILE && of_item < Q::items(args.n_cols);
        return exists ? Q::column(of_item, of_value / Q::PART) + of_value % Q::PART : args.n_cols;
    };
    const u32 i = threadIdx.x, column = column_of(i);
    const bool listed = args.n_ids != nullptr;
    // Another launch with these counts, right before this one, may not have ended; but then all of its blocks have started.
    if (gridDim.y > 1 && i == 0) atomicAdd(&args.counts[blockIdx.x].started, 1u);
    // the first ids are asked for together with how many there are
#pragma unroll
    for (int t = 0; t < DOWN_FEW; t++) {
        const u32 place = DownOfList::place(own.first + t * own.STEP);
        of_few.ids[t] = listed && place < args.n_a ? load_written(args.ids + place) : 0;
        if (t < DOWN_TOGETHER) own.ids[t] = of_few.ids[t];
    }
    const u32 n = listed ? min(load_written(args.n_ids), args.n_a) : args.n_neurons;
    const DownPlaces places(listed, n);
    const DownOfList of_list(args, n);
    const DownAll of_all(args);
    // the same in all threads of a block
    const bool few = listed && of_list.n() <= DOWN_FEW * own.STEP;
    if (!args.skip && few) of_few.load_rows(of_list, own.first);
    if (!args.skip && listed && !few) own.load_rows(of_list, own.first);
    if (!args.skip && !listed) own.load_items(of_all, own.first);
    wait_for_launch_before();
    start_next_launch();
    const auto before_of = [&](u32 column) { return args.add != nullptr && column < args.n_cols ? args.add[column] : 0.0f; };
    const auto weight_of = [&](u32 column) {
        return args.then.squares != nullptr && column < args.n_cols ? args.then.weight[column] : 0.0f;
    };
    const float before = before_of(column), weight = weight_of(column);
    if (!args.skip && few) {
        of_few.load_a(of_list, own.first);
        of_few.add_first(of_list);
    } else if (!args.skip && listed) {
        own.load_a(of_list, own.first);
        own.add(of_list);
    } else if (!args.skip) {
        own.load_a(of_all, own.first);
        own.add_steps(of_all);
    } else {
        for (u32 first = 0; first < places.n_runs; first += DOWN_LIST / WARP) {
            find_active(args, places, first, list);
            own.load_items(DownListed{list}, own.first);
            own.load_a(DownListed{list}, own.first);
            own.add(DownListed{list});
        }
    }

    // asked for before it is needed
    u32 started = gridDim.y > 1 ? load_relaxed(&args.counts[blockIdx.x].started) : 0;
    join_lanes<16, VALUES / 2>(acc);
    join_lanes<8, VALUES / 4>(acc);
    float* mine = sums[warp] + lane % DOWN_ITEMS * VALUES + lane / 16 * (VALUES / 2) + lane / 8 % 2 * (VALUES / 4);
#pragma unroll
    for (int v = 0; v < VALUES / (int)DOWN_GROUPS; v++) mine[v] = acc[v];
    __syncthreads();
    float sum = 0.0f;
    if (i < TILE)
#pragma unroll
        for (u32 w = 0; w < DOWN_WARPS; w++) sum += sums[w][i];
    // columns are those of lanes, in whole blocks where there is a norm behind
    const auto done = [&](u32 column, float before, float weight, float sum) {
        if (column >= args.n_cols) return;
        args.out[column] = sum + before;
        if (args.then.squares != nullptr) then_norm(args.then, column / BLOCK, sum + before, weight);
    };
    if (gridDim.y == 1) return done(column, before, weight, sum);
    u32* tile = args.partials + (u64)blockIdx.x * gridDim.y * TILE;
    join_parts<TILE>(tile, i, args.counts + blockIdx.x, started, sum, [&](u32 at, float sum) {
        if (at == i) return done(column, before, weight, sum);
        const u32 column = column_of(at);
        done(column, before_of(column), weight_of(column), sum);
    });
}
static_assert(32 * DOWN_ITEMS <= DOWN_WARPS * WARP, "a thread for each value of a tile");
static_assert(4 * DOWN_ITEMS % WARP == 0, "whole warps");

#define DOWN(Q) \
    extern "C" __global__ void __launch_bounds__(DOWN_WARPS * WARP, 2) down_##Q(DownArgs args) { down<Q>(args); }

DOWN(F32)
DOWN(F16)
DOWN(BF16)
DOWN(Q4_0)
DOWN(Q4_1)
DOWN(Q5_0)
DOWN(Q8_0)
DOWN(Q4_K)
DOWN(Q5_K)
DOWN(Q6_K)

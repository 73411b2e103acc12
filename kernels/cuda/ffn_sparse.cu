// The second half of the feed-forward network over a list of neurons: the sum of their down rows, of which those whose factor
// is zero can be left unread. (The first half is in rows.cu.) No sum depends on which block is first.
#include "quant.cuh"

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
    // [gridDim.x, gridDim.y, 32 * values of an item] f32
    float* partials;
    // [gridDim.x], zeros
    u32* tickets;
    // whether rows whose factor is zero are left unread
    u32 skip;
};
static_assert(sizeof(DownArgs) == 96, "as the launcher has it");

// Two blocks fill a multiprocessor: more warps a block leave fewer parts to join behind, and more steps to join within.
constexpr u32 DOWN_WARPS = 12;
constexpr u32 DOWN_ROUNDS = 3;
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

    // Lists are divided evenly. Of all neurons a block has every gridDim.y-th run, because those that fire often lie together.
    __device__ __forceinline__ DownPlaces(bool is_list, u32 n) {
        begin = is_list ? (u32)((u64)n * blockIdx.y / gridDim.y) : blockIdx.y * WARP;
        end = is_list ? (u32)((u64)n * (blockIdx.y + 1) / gridDim.y) : n;
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
        ids[r] = args.n_ids == nullptr || j >= places.end ? j : args.ids[j];
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
            // a neuron that does not exist: NaN times the first row
            list.ids[at] = ids[r] < args.n_neurons ? ids[r] : 0;
            list.a[at] = ids[r] < args.n_neurons ? a[r] : not_a_number();
        }
    }
    __syncthreads();
}
static_assert(DOWN_WARPS <= WARP, "a lane for each warp's counts");

// Block (x, y): items 32 x ... 32 x + 31 of the rows, one a lane, of part y of the list; warp w takes active neurons w, w + 12,
// .... The warps are joined pairwise, the blocks of a column in ascending order by whichever ends last.
template <class Q>
__device__ __forceinline__ void down(const DownArgs& args) {
    constexpr int VALUES = Q::PARTS * Q::PART, TOGETHER = 4;
    __shared__ DownList list;
    // values that are joined at a time
    constexpr int JOINED = VALUES < 16 ? VALUES : 16;
    __shared__ float halves[DOWN_WARPS / 2][JOINED][WARP];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 item = blockIdx.x * WARP + lane, n_items = Q::items(args.n_cols);
    wait_for_launch_before();
    const u32 n = args.n_ids == nullptr ? args.n_neurons : min(*args.n_ids, args.n_a);
    const DownPlaces places(args.n_ids != nullptr, n);
    float acc[VALUES];
#pragma unroll
    for (int v = 0; v < VALUES; v++) acc[v] = 0.0f;

    for (u32 first = 0; first < places.n_runs; first += DOWN_LIST / WARP) {
        find_active(args, places, first, list);
        if (item >= n_items) continue;
#pragma unroll 1
        for (u32 k = warp; k < list.n; k += DOWN_WARPS * TOGETHER) {
            Q items[TOGETHER];
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                u32 at = k + t * DOWN_WARPS;
                if (at < list.n) items[t].load(args.rows + list.ids[at] * args.stride, args.n_cols, item);
            }
#pragma unroll
            for (int t = 0; t < TOGETHER; t++) {
                u32 at = k + t * DOWN_WARPS;
                if (at >= list.n) break;
                float a = list.a[at];
#pragma unroll
                for (int part = 0; part < Q::PARTS; part++) {
                    float w[Q::PART];
                    if constexpr (Q::QUANTISED && !Q::HAS_MIN) {
                        part_integers(items[t], part, w);
                        float scale = a * items[t].scale(item, part);
#pragma unroll
                        for (int v = 0; v < Q::PART; v++)
                            acc[part * Q::PART + v] = fmaf(w[v], scale, acc[part * Q::PART + v]);
                    } else {
                        // scaled value and minimum may nearly cancel: their sum is taken first
                        part_values(items[t], item, part, w);
#pragma unroll
                        for (int v = 0; v < Q::PART; v++) acc[v] = fmaf(w[v], a, acc[v]);
                    }
                }
            }
        }
    }

    // the upper half of the warps is added to the lower one, until one is left
#pragma unroll
    for (int first = 0; first < VALUES; first += JOINED)
#pragma unroll 1
        for (u32 n_warps = DOWN_WARPS; n_warps > 1; n_warps = (n_warps + 1) / 2) {
            const u32 lower = (n_warps + 1) / 2;
            __syncthreads();
            if (warp >= lower && warp < n_warps)
#pragma unroll
                for (int v = 0; v < JOINED; v++) halves[warp - lower][v][lane] = acc[first + v];
            __syncthreads();
            if (warp < n_warps - lower)
#pragma unroll
                for (int v = 0; v < JOINED; v++) acc[first + v] += halves[warp][v][lane];
        }
    constexpr u32 TILE = VALUES * WARP;
    float* tile = args.partials + (u64)blockIdx.x * gridDim.y * TILE;
    if (warp == 0)
#pragma unroll
        for (int v = 0; v < VALUES; v++) tile[blockIdx.y * TILE + v * WARP + lane] = acc[v];
    start_next_launch();
    if (!is_last_block(args.tickets + blockIdx.x, gridDim.y)) return;

#pragma unroll 1
    for (u32 i = threadIdx.x * 4; i < TILE; i += DOWN_WARPS * WARP * 4) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 16
        for (u32 y = 0; y < gridDim.y; y++) {
            float4 part = __ldcg((const float4*)(tile + y * TILE + i));
            sums[0] += part.x;
            sums[1] += part.y;
            sums[2] += part.z;
            sums[3] += part.w;
        }
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            u32 of = blockIdx.x * WARP + i % WARP + k, v = i / WARP;
            u32 column = Q::column(of, v / Q::PART) + v % Q::PART;
            if (of < n_items && column < args.n_cols)
                args.out[column] = args.add == nullptr ? sums[k] : args.add[column] + sums[k];
        }
    }
}

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

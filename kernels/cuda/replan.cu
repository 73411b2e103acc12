// What re-planning counts and moves: which hot neurons fired, token by token; and rows that go to other places.
#include "common.cuh"

// Tokens whose marks are kept, by position.
constexpr u32 MARK_TOKENS = 64;
constexpr u32 MARK_THREADS = 1024;
// Neurons of a block.
constexpr u32 MARK_NEURONS = 8192;
constexpr u32 MARK_WORDS = MARK_NEURONS / WARP;

struct MarkArgs {
    // [n] f32: of all neurons, or of those of the list
    const float* act;
    // [n] u32 and [1] u32, or null: all neurons
    const u32* ids;
    const u32* count;
    // [1]
    const u32* position;
    // [MARK_TOKENS][n_words]: a bit for each neuron
    u32* marks;
    u64 n_words;
    // of the layer's first neuron
    u32 first_word;
    u32 n;
};
static_assert(sizeof(MarkArgs) == 56, "as the launcher has it");

// Marks the neurons of a layer whose activation is not zero, and takes back all other marks that the layer has for tokens of this
// position: a token that is repeated counts once.
extern "C" __global__ void __launch_bounds__(MARK_THREADS) mark_active(MarkArgs args) {
    __shared__ u32 words[MARK_WORDS];
    const u32 first = blockIdx.x * MARK_NEURONS, n_own = min(args.n - first, MARK_NEURONS);
    if (threadIdx.x < MARK_WORDS) words[threadIdx.x] = 0;
    __syncthreads();
    wait_for_launch_before();
    if (args.ids == nullptr) {
#pragma unroll
        for (u32 k = 0; k < MARK_NEURONS / MARK_THREADS; k++) {
            const u32 i = k * MARK_THREADS + threadIdx.x;
            const bool active = i < n_own && args.act[first + i] != 0.0f;
            const u32 of_warp = __ballot_sync(ALL_LANES, active);
            if (threadIdx.x % WARP == 0) words[i / WARP] = of_warp;
        }
    } else {
        const u32 n_listed = min(*args.count, args.n);
        for (u32 j = threadIdx.x; j < n_listed; j += MARK_THREADS) {
            // ids before the block's become large
            const u32 i = args.ids[j] - first;
            if (i < n_own && args.act[j] != 0.0f) atomicOr(&words[i / WARP], 1u << (i % WARP));
        }
    }
    __syncthreads();
    start_next_launch();
    u32* to = args.marks + (*args.position % MARK_TOKENS) * args.n_words + args.first_word + first / WARP;
    if (threadIdx.x < (n_own + WARP - 1) / WARP) to[threadIdx.x] = words[threadIdx.x];
}

struct CountArgs {
    // [MARK_TOKENS][n_words]
    const u32* marks;
    // a bit for each token that counts
    u64 tokens;
    // [n_words * 32]
    u32* counts;
    u32 n_words;
};
static_assert(sizeof(CountArgs) == 32, "as the launcher has it");

// Adds each neuron's marks of some tokens to its count.
extern "C" __global__ void __launch_bounds__(256) count_marks(CountArgs args) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x, word = i / WARP, bit = i % WARP;
    wait_for_launch_before();
    start_next_launch();
    if (word >= args.n_words) return;
    u32 sum = 0;
    for (u32 token = 0; token < MARK_TOKENS; token++)
        if (args.tokens >> token & 1) sum += args.marks[u64(token) * args.n_words + word] >> bit & 1;
    args.counts[i] += sum;
}

struct ScatterArgs {
    // [n] words of all pieces
    const u32* from;
    // [n_pieces][4]: the low and the high half of the word of `to`, the word of `from`, words
    const u32* pieces;
    u32* to;
};
static_assert(sizeof(ScatterArgs) == 24, "as the launcher has it");

// Copies pieces to their places, a block each. Who reads them is launched when it has ended.
extern "C" __global__ void __launch_bounds__(128) scatter(ScatterArgs args) {
    wait_for_launch_before();
    start_next_launch();
    const u32* piece = args.pieces + u64(blockIdx.x) * 4;
    u32* to = args.to + (u64(piece[1]) << 32 | piece[0]);
    const u32* from = args.from + piece[2];
    for (u32 i = threadIdx.x; i < piece[3]; i += blockDim.x) to[i] = from[i];
}

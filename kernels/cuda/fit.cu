// Products and steps that predictors are fitted with. Sums have an order of their own, which depends on shapes alone.
#include "common.cuh"

// Values of a block's part of a product, in each direction, and how many products of each are under way.
constexpr u32 FIT_TILE = 64, FIT_DEPTH = 16;
constexpr u32 FIT_THREADS = 256;
// Values in each direction of a thread.
constexpr u32 FIT_OWN = 4;
// Products that are summed in f32 before they join another sum.
constexpr u32 FIT_SLICE = 512;

// Values of a matrix, which may be turned: (i, k) lies at `i * row + k * column`; one of the two is 1.
template <class V>
struct FitMatrix {
    const V* at;
    u64 row, column;
};

template <class V>
struct FitProductArgs {
    // [m, k] and [n, k]
    FitMatrix<V> a, b;
    // [ceil(k / FIT_SLICE), m, n] f32, or [m, n] f64
    void* out;
    u32 m, n, k;
    u32 n_slices;
};
static_assert(sizeof(FitProductArgs<float>) == 72 && sizeof(FitProductArgs<double>) == 72, "as the launcher has it");

// (Padded, so that neither rows nor columns that are stored at a time share all their banks.)
template <class V>
using FitPart = V[FIT_DEPTH][FIT_TILE + 4];

// Takes rows `first ..` and columns `from ..` of a matrix `[n_rows, n_columns]`; what lies outside is 0.
template <class V>
__device__ __forceinline__ void fit_load(
    const FitMatrix<V>& matrix, u32 first, u32 n_rows, u32 from, u32 end, FitPart<V>& part) {
    bool along = matrix.column == 1;
#pragma unroll
    for (u32 n = threadIdx.x; n < FIT_TILE * FIT_DEPTH; n += FIT_THREADS) {
        u32 i = along ? n / FIT_DEPTH : n % FIT_TILE, k = along ? n % FIT_DEPTH : n / FIT_TILE;
        bool inside = first + i < n_rows && from + k < end;
        part[k][i] = inside ? matrix.at[(first + i) * matrix.row + (from + k) * matrix.column] : V(0);
    }
}

__device__ __forceinline__ float fit_fma(float x, float y, float sum) { return fmaf(x, y, sum); }
__device__ __forceinline__ double fit_fma(double x, double y, double sum) { return fma(x, y, sum); }

// The thread's sums over `from .. end`.
template <class V>
__device__ __forceinline__ void fit_sums(const FitProductArgs<V>& args, u32 from, u32 end, V (&sums)[FIT_OWN][FIT_OWN]) {
    __shared__ __align__(16) FitPart<V> a, b;
    u32 first_row = blockIdx.y % ((args.m + FIT_TILE - 1) / FIT_TILE) * FIT_TILE, first_column = blockIdx.x * FIT_TILE;
    u32 row = threadIdx.x / (FIT_TILE / FIT_OWN) * FIT_OWN, column = threadIdx.x % (FIT_TILE / FIT_OWN) * FIT_OWN;
#pragma unroll 1
    for (; from < end; from += FIT_DEPTH) {
        fit_load(args.a, first_row, args.m, from, end, a);
        fit_load(args.b, first_column, args.n, from, end, b);
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < FIT_DEPTH; k++) {
            V xs[FIT_OWN], ys[FIT_OWN];
#pragma unroll
            for (u32 i = 0; i < FIT_OWN; i++) xs[i] = a[k][row + i], ys[i] = b[k][column + i];
#pragma unroll
            for (u32 i = 0; i < FIT_OWN; i++)
#pragma unroll
                for (u32 j = 0; j < FIT_OWN; j++) sums[i][j] = fit_fma(xs[i], ys[j], sums[i][j]);
        }
        __syncthreads();
    }
}

template <class V, class T>
__device__ __forceinline__ void fit_store(const FitProductArgs<V>& args, u32 slice, const T (&sums)[FIT_OWN][FIT_OWN]) {
    u32 row = blockIdx.y % ((args.m + FIT_TILE - 1) / FIT_TILE) * FIT_TILE + threadIdx.x / (FIT_TILE / FIT_OWN) * FIT_OWN;
    u32 column = blockIdx.x * FIT_TILE + threadIdx.x % (FIT_TILE / FIT_OWN) * FIT_OWN;
    T* out = (T*)args.out + (u64)slice * args.m * args.n;
#pragma unroll
    for (u32 i = 0; i < FIT_OWN; i++)
#pragma unroll
        for (u32 j = 0; j < FIT_OWN; j++)
            if (row + i < args.m && column + j < args.n) out[(u64)(row + i) * args.n + column + j] = sums[i][j];
}

// a · bᵀ, each slice's by itself.
extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_product(FitProductArgs<float> args) {
    start_next_launch();
    wait_for_launch_before();
    u32 slice = blockIdx.y / ((args.m + FIT_TILE - 1) / FIT_TILE);
    u32 from = slice * FIT_SLICE, end = min(from + FIT_SLICE, args.k);
    float sums[FIT_OWN][FIT_OWN] = {};
    fit_sums(args, from, end, sums);
    fit_store(args, slice, sums);
}

// a · bᵀ, slices summed in f64.
extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_long_product(FitProductArgs<float> args) {
    start_next_launch();
    wait_for_launch_before();
    double all[FIT_OWN][FIT_OWN] = {};
#pragma unroll 1
    for (u32 from = 0; from < args.k; from += FIT_SLICE) {
        float sums[FIT_OWN][FIT_OWN] = {};
        fit_sums(args, from, min(from + FIT_SLICE, args.k), sums);
#pragma unroll
        for (u32 i = 0; i < FIT_OWN; i++)
#pragma unroll
            for (u32 j = 0; j < FIT_OWN; j++) all[i][j] += sums[i][j];
    }
    fit_store(args, 0, all);
}

// a · bᵀ in f64.
extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_double_product(FitProductArgs<double> args) {
    start_next_launch();
    wait_for_launch_before();
    double sums[FIT_OWN][FIT_OWN] = {};
    fit_sums(args, 0, args.k, sums);
    fit_store(args, 0, sums);
}

struct FitRowsArgs {
    // [n_from, n_columns]
    const float* from;
    // [n_rows] of its rows
    const u32* ids;
    // [n_columns]
    const float* scales;
    // [n_rows, n_columns]
    float* out;
    u32 n_rows, n_columns, n_from;
};
static_assert(sizeof(FitRowsArgs) == 48, "as the launcher has it");

// Some rows, each column times its scale; a row that does not exist is not a number.
extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_rows(FitRowsArgs args) {
    start_next_launch();
    wait_for_launch_before();
    u32 column = blockIdx.x * FIT_THREADS + threadIdx.x, row = blockIdx.y;
    if (column >= args.n_columns) return;
    u32 id = args.ids[row];
    args.out[(u64)row * args.n_columns + column] =
        id < args.n_from ? args.from[(u64)id * args.n_columns + column] * args.scales[column] : not_a_number();
}

struct FitJoinArgs {
    // [n_slices, n_rows, n_columns]
    const float* slices;
    // [n_columns], or [n_rows, n_columns]
    const float* beside;
    // [n_rows, n_columns]
    float* out;
    u32 n_slices, n_rows, n_columns, backward;
};
static_assert(sizeof(FitJoinArgs) == 40, "as the launcher has it");

// Sums of slices. Forward: plus the biases `beside`, where that is above zero, else 0. Backward: where `beside`, which came forward,
// is above zero, else 0.
extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_join(FitJoinArgs args) {
    start_next_launch();
    wait_for_launch_before();
    u32 at = blockIdx.x * FIT_THREADS + threadIdx.x, n = args.n_rows * args.n_columns;
    if (at >= n) return;
    float sum = 0.0f;
    for (u32 slice = 0; slice < args.n_slices; slice++) sum += args.slices[(u64)slice * n + at];
    if (args.backward)
        args.out[at] = args.beside[at] > 0.0f ? sum : 0.0f;
    else
        args.out[at] = fmaxf(sum + args.beside[at % args.n_columns], 0.0f);
}

struct FitErrorsArgs {
    // [n_rows, n_columns]: scores, then how the loss changes with them
    float* scores;
    // [n_columns]
    const float* biases;
    // [n_masses, n_columns]
    const float* masses;
    // [n_rows] of its rows
    const u32* ids;
    u32 n_rows, n_columns, n_masses;
    float unit, most;
};
static_assert(sizeof(FitErrorsArgs) == 56, "as the launcher has it");

// Of the loss (m/unit)·softplus(−s) + softplus(s) over rows, m/unit at most `most`.
extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_errors(FitErrorsArgs args) {
    start_next_launch();
    wait_for_launch_before();
    u32 column = blockIdx.x * FIT_THREADS + threadIdx.x, row = blockIdx.y;
    if (column >= args.n_columns) return;
    u32 id = args.ids[row];
    float mass = id < args.n_masses ? args.masses[(u64)id * args.n_columns + column] : not_a_number();
    float weight = mass / args.unit;
    // (`fminf` would hide what is not a number)
    if (weight > args.most) weight = args.most;
    float* score = args.scores + (u64)row * args.n_columns + column;
    float open = 1.0f / (1.0f + expf(-(*score + args.biases[column])));
    *score = (open * (1.0f + weight) - weight) / (float)args.n_rows;
}

struct FitColumnsArgs {
    // [n_rows, n_columns]
    const float* values;
    // [n_columns]
    float* sums;
    u32 n_rows, n_columns;
};
static_assert(sizeof(FitColumnsArgs) == 24, "as the launcher has it");

extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_columns(FitColumnsArgs args) {
    start_next_launch();
    wait_for_launch_before();
    u32 column = blockIdx.x * FIT_THREADS + threadIdx.x;
    if (column >= args.n_columns) return;
    float sum = 0.0f;
    for (u32 row = 0; row < args.n_rows; row++) sum += args.values[(u64)row * args.n_columns + column];
    args.sums[column] = sum;
}

struct FitAdamArgs {
    // [n] each
    float *values, *mean, *square;
    const float* gradient;
    u64 n;
    float rate, decay[2], unbias[2];
};
static_assert(sizeof(FitAdamArgs) == 64, "as the launcher has it");

extern "C" __global__ void __launch_bounds__(FIT_THREADS) fit_adam(FitAdamArgs args) {
    start_next_launch();
    wait_for_launch_before();
    u64 at = (u64)blockIdx.x * FIT_THREADS + threadIdx.x;
    if (at >= args.n) return;
    float gradient = args.gradient[at];
    float mean = args.mean[at] + (1.0f - args.decay[0]) * (gradient - args.mean[at]);
    float square = args.square[at] + (1.0f - args.decay[1]) * (gradient * gradient - args.square[at]);
    args.mean[at] = mean;
    args.square[at] = square;
    args.values[at] -= args.rate * mean * args.unbias[0] / (sqrtf(square * args.unbias[1]) + 1e-8f);
}

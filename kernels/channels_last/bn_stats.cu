// bn_stats: count, mean and m2 = sum((x - mean)^2) of each channel, in P parts that are still to be merged
//
// Block (t, s) takes a tile of columns and a range of rows. Each thread sums chunks of each of its WIDTH channels in
// float32 about their first element, a second time about their mean, and merges them in float64; then the block merges
// its rows of threads. An outlier that makes up most of a channel's variance does so in one chunk: sums there have few
// roundings. Every replica of a channel is a part of its own.
// Mirror: numpy_ops.bn_stats
#include "columns.cuh"

constexpr int LOADS = 8;  // in flight

// Whether element e of the first `count` packs has this value in all of them: then, and only then, 0 is the right sum of
// squares.
template <class A>
DEVICE bool all_are(A value, const raw_t (&raw)[LOADS], int count, int e) {
    bool same = true;
#pragma unroll
    for (int u = 0; u < LOADS; u++) same = same && (u >= count || element(raw[u], e) == value);
    return same;
}

// The moments of element e of the first `count` packs, in the dtype A. About a neighbour as pivot, deviations are exact
// or nearly so.
template <class A>
DEVICE Moments chunk_moments(const raw_t (&raw)[LOADS], int count, int e, bool& exact) {
    const A pivot = element(raw[0], e);
    A sum = 0;
#pragma unroll
    for (int u = 0; u < LOADS; u++)
        if (u < count) sum += element(raw[u], e) - pivot;
    const double inv_count = inverse<LOADS>(count);
    const A offset = sum * (A)inv_count;
    A sum_d = 0, sum_dd = 0;
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
        const A d = u < count ? (element(raw[u], e) - pivot) - offset : 0;
        sum_d += d;
        sum_dd += d * d;
    }
    exact = held_squares<A>(sum_dd) || (sum_dd == 0 && all_are(pivot, raw, count, e));
    return from_sums(count, inv_count, pivot, offset, sum_d, sum_dd);
}

extern "C" __global__ void ROOMY_LAUNCH_BOUNDS bn_stats(
    const data_t* x,                         // [M, C]
    const long long* num_batches_tracked,    // [] or null
    // outputs
    double* moments_count,                   // [P]
    double* moments_mean,                    // [P, C]
    double* moments_m2,                      // [P, C]
    long long* moments_batches,              // [] or null: the counter as it was, for the launch that moves it
    // sizes
    long long M,
    long long C,
    long long columns,
    long long super_rows,
    long long super_rows_per_block,
    long long tile) {
    const Columns block(false, M, C, columns, super_rows, super_rows_per_block, tile);
    const long long first_part = block.first_part();
    if (blockIdx.x == 0 && block.share == 0 && threadIdx.x == 0 && moments_batches)
        *moments_batches = *num_batches_tracked;

    if (block.tail_begin < block.tail_end) {
        const int q = threadIdx.x;
        if (block.owns(q)) {
            Moments own = {0, 0, 0};
            for (index_t row = block.tail_begin; row < block.tail_end; row++)
                own = merge(own, {1, widen(x[row * C + block.q0 + q]), 0});
            moments_mean[first_part * C + block.q0 + q] = own.mean;
            moments_m2[first_part * C + block.q0 + q] = own.m2;
            if (block.q0 + q == 0) moments_count[first_part] = own.count;
        }
        return;  // as do all threads of the block
    }

    // In shared memory, as registers are wanted for what is in flight. Each thread has its own until all are merged.
    __shared__ double counts[THREADS], means[WIDTH][THREADS], m2s[WIDTH][THREADS];
    const int t = threadIdx.x;
    double count = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) means[e][t] = m2s[e][t] = 0;
    for (index_t row = block.begin + block.ty; block.on && row < block.end; row += LOADS * block.step) {
        raw_t raw[LOADS];
        int loaded = 0;
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            raw[u] = raw_t();
            if (row + u * block.step < block.end) {
                raw[u] = load(x + block.at(row + u * block.step));
                loaded++;
            }
        }
        const double share = loaded / (count + loaded);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            bool exact;
            Moments chunk = chunk_moments<acc_t>(raw, loaded, e, exact);
            if (!exact) chunk = chunk_moments<double>(raw, loaded, e, exact);
            const Moments both = merge({count, means[e][t], m2s[e][t]}, chunk, share);
            means[e][t] = both.mean;
            m2s[e][t] = both.m2;
        }
        count += loaded;
    }

    counts[t] = count;
    __syncthreads();

    const Standing at(block.sum_lanes(), block.sum_rows());
    Moments own = {0, 0, 0};
    for (int row = at.row; row < block.sum_rows() && at.row < at.rows; row += at.rows) {
        const int value = row * block.sum_pitch() + at.q, e = value % WIDTH, thread = value / WIDTH;
        own = merge(own, {counts[thread], means[e][thread], m2s[e][thread]});
    }
    const Moments all = merge_down(at, own);
    if (at.row == 0) {
        moments_mean[first_part * C + block.q0 + at.q] = all.mean;
        moments_m2[first_part * C + block.q0 + at.q] = all.m2;
    }
    if (blockIdx.x == 0 && at.row == 0)
        for (int part = at.q; part < block.parts(); part += at.lanes) moments_count[first_part + part] = all.count;
}

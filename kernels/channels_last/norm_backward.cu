// norm_backward: dx = rstd * (weight * g - mean(weight * g) - xhat * mean(weight * g * xhat)), g = dy where activation
// passed it, else 0; dresidual = g. Means are those of each group of channels of each sample.
//
// A block, or all blocks of a cluster, take a span of one sample: whole groups. They keep dy and x in shared memory, and
// each element is read once. Each block leaves its sums of the channels as a part. Those of the span's lanes, each times
// its scale, are added up group by group, and then over the cluster. Of what does not fit, one launch leaves the sums,
// and another one goes on.
// Mirror: numpy_norms.norm_backward
#include "gradient_sums.cuh"
#include "parts.cuh"
#include "samples.cuh"

// Writes the gradients of a thread's packs, as input_gradients_all does, where the statistics are those of rows of
// channels.
template <class Source, class Packs, class Left, class Channels>
DEVICE void row_gradients_all(const Source& dy, const Source& x, const Packs& packs, const Left& left,
                              const Epilogue& epilogue, const Channels& channels, const Gradients& gradients) {
    const passed_t* const record = epilogue.passed;
    if (sizeof(acc_t) < 8 && channels.any_wide)
        input_gradients<true, 1>(dy, x, packs, left, {gate_of(epilogue), record}, OF_ROW, channels, gradients);
    else
        with_gate(epilogue, [&](auto gate) {
            input_gradients<false, Packs::PAIRS>(dy, x, packs, left, {gate, record}, OF_ROW, channels, gradients);
        });
}

// Channel c, whose mean and variance are those of its row.
DEVICE Channel channel_of_row(const Span& span, const Statistics& statistics, const Affine& affine, index_t c) {
    const double* pair = statistics.pairs + 2 * (span.first_row() + span.group_of(c));
    return make_channel(pair[0], pair[1], affine, read_affine(affine, c));
}

// Adds the sums of a tile's lanes, each times the scale of its channel, to those of their groups. Thread q has those of
// lane q. All threads call it.
DEVICE void add_lanes(const Span& span, const Tile& tile, const Lanes& lanes, const double (&lane)[2],
                      double (*groups)[2]) {
    __shared__ double scaled[2][MOST_LANES];
    if (tile.looks_after())
#pragma unroll
        for (int k = 0; k < 2; k++) scaled[k][threadIdx.x] = lanes.channels[threadIdx.x].scale * lane[k];
    __syncthreads();
    const Gathering at(span, tile);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const double some = at.sum([&](int q) { return scaled[k][q]; });
        if (at.keeps()) groups[at.group][k] = at.opens ? some : groups[at.group][k] + some;
    }
}

// Takes the sums of lane q of tile t, for thread q: over the block's rows, as a part of the sums, or, after the sums,
// over those of all parts. All threads call it.
DEVICE void lane_sums(const Span& span, int t, const data_t* dy, const data_t* x, const Epilogue& epilogue,
                      const Lanes& lanes, const Sums& sums, int parts, double (&of_lane)[2]) {
#if PHASE == AFTER_SUMS
    add_parts(span.tile(t), sums, parts, of_lane);
#else
    {
        const Tile tile = span.tile(t);
        const Packs packs(tile);
        const OwnChannels channels(tile, lanes);
        ColumnSums of_thread;
        sum_all(span.source<ROWS>(t, packs, dy, 0), span.source<ROWS>(t, packs, x, 1), packs, Left(nullptr, tile),
                epilogue, channels, of_thread);
        sum_tile(tile, of_thread, of_lane);
    }
    const Tile tile = span.tile(t);  // anew: none of it has to stay in registers
    if (!tile.looks_after()) return;
    finish_sums(of_lane, lanes.channels[threadIdx.x]);
    if (sums.dy) set_sums(sums, Span::share() * (long long)span.C + tile.channel(), of_lane);
#endif
}

extern "C" __global__ void CLUSTER REGISTERS(128) norm_backward(
    const data_t* dy,                        // [N, A, C]
    const data_t* x,                         // [N, A, C]
    Statistics statistics,                   // of the rows, which are groups of samples
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is read
    // outputs
    Gradients gradients,                     // those of weight and bias follow from the sums
    Sums sums,                               // or null; [N, P, C]
    // sizes
    long long parts,
    Samples sizes) {
    const Span& span = span_of_block(sizes);
    if (!span.there) return;
    if (sums.dy) {
        sums.dy += span.sample * parts * sizes.C;
        sums.dy_xhat += span.sample * parts * sizes.C;
    }
#if PHASE == WHOLE
#pragma unroll 1
    for (int t = 0; t < span.tiles(); t++) stage<ROWS>({span.kept(t, 0), span.kept(t, 1)}, {dy, x}, Packs(span.tile(t)));
#endif
    __shared__ Lanes lanes;
#if PHASE != ONLY_SUMS
    __shared__ double groups[MOST_LANES][2], means[MOST_LANES][2];  // of this block's groups; over the cluster
#endif
#pragma unroll 1
    for (int t = 0; t < span.tiles(); t++) {
        if (t > 0) __syncthreads();
        const Tile tile = span.tile(t);
        if (tile.looks_after()) lanes.set(threadIdx.x, channel_of_row(span, statistics, affine, tile.channel()));
        double of_lane[2] = {0, 0};
        lane_sums(span, t, dy, x, epilogue, lanes, sums, (int)parts, of_lane);
#if PHASE != ONLY_SUMS
        add_lanes(span, span.tile(t), lanes, of_lane, groups);
#endif
    }

#if PHASE != ONLY_SUMS
    show_cluster();
    const int g = threadIdx.x;
    if (g < span.groups())
#pragma unroll
        for (int k = 0; k < 2; k++) {
            double sum = 0;
#pragma unroll
            for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) sum += (*of_block(groups + g, rank))[k];
            means[g][k] = sum / ((double)sizes.group * (double)sizes.A);
        }
    cluster_arrive();  // this block has read what the others have left

#pragma unroll 1
    for (int t = 0; t < span.tiles(); t++) {
        __syncthreads();
        const Tile tile = span.tile(t);
        const Packs packs(tile);
        if (tile.looks_after()) {
            const index_t c = tile.channel();
            Channel channel =
                SEVERAL_TILES ? channel_of_row(span, statistics, affine, c) : lanes.channels[threadIdx.x];
            set_row_gradient(channel, means[span.group_of(c)]);
            lanes.set(threadIdx.x, channel);
        }
        const OwnChannels channels(tile, lanes);
        row_gradients_all(span.source<ROWS>(t, packs, dy, 0), span.source<ROWS>(t, packs, x, 1), packs,
                          Left(nullptr, tile), PHASE == WHOLE ? Epilogue() : epilogue, channels, gradients);
    }
    cluster_wait();  // what this block has left may go
#endif
}

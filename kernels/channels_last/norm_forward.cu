// norm_forward: out = activation((x - mean) * rstd * weight + bias + residual), with mean and var of each group of
// channels of each sample
//
// A block, or all blocks of a cluster, take a span of one sample: whole groups. They keep it in shared memory, and each
// element is read once. The moments of the span's lanes, over the rows, are merged group by group, and then over the
// cluster. Of what does not fit, one launch leaves the moments of channels in parts, and another one goes on.
// Mirror: numpy_norms.norm_forward
#include "../normalizing.cuh"
#include "../running.cuh"
#include "parts.cuh"
#include "samples.cuh"
#include "statistics.cuh"

// Adds the moments of a tile's lanes, each over so many rows, to those of their groups. Thread q has those of lane q. All
// threads call it.
DEVICE void add_lanes(const Span& span, const Tile& tile, const ChannelMoments& lane, double rows,
                      ChannelMoments* groups) {
    __shared__ double means[MOST_LANES], squares[MOST_LANES];
    if (tile.looks_after()) {
        means[threadIdx.x] = lane.mean;
        squares[threadIdx.x] = lane.m2;
    }
    __syncthreads();
    const Gathering at(span, tile);
    const double lanes = at.end - at.begin;
    const double pivot = means[min(at.begin, tile.lanes - 1)];
    const double mean = pivot + at.sum([&](int q) { return means[q] - pivot; }) / lanes;
    const double m2 = at.sum([&](int q) {
        const double away = means[q] - mean;
        return squares[q] + rows * away * away;
    });
    if (!at.keeps()) return;
    const ChannelMoments some = rows > 0 ? ChannelMoments{rows * lanes, mean, m2} : ChannelMoments{0, 0, 0};
    groups[at.group] = at.opens ? some : merge(groups[at.group], some);
}

// The moments of group g over all blocks of the cluster, each of which has left its own there. The first block has rows.
DEVICE ChannelMoments merge_blocks(ChannelMoments* groups, int g) {
    ChannelMoments own[CLUSTER_BLOCKS];
    double count = 0, sum = 0, m2 = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) {
        own[rank] = *of_block(groups + g, rank);
        count += own[rank].count;
        if (own[rank].count > 0) sum += own[rank].count * (own[rank].mean - own[0].mean);
    }
    const double mean = own[0].mean + sum / count;
#pragma unroll
    for (int rank = 0; rank < CLUSTER_BLOCKS; rank++) {
        const double away = own[rank].mean - mean;
        if (own[rank].count > 0) m2 += own[rank].m2 + own[rank].count * away * away;
    }
    return {count, mean, m2};
}

// The moments of lane q of tile t, for thread q: over the block's rows or, after the sums, over those of all parts.
DEVICE ChannelMoments lane_moments(const Span& span, int t, const data_t* x, const Moments& moments, int parts) {
    const Tile tile = span.tile(t);
#if PHASE == AFTER_SUMS
    return merge_parts(tile, moments, parts);
#else
    const Packs packs(tile);
    return moments_of(tile, span.source<CHUNK>(t, packs, x), packs, Left(nullptr, tile), x + span.top * span.C);
#endif
}

extern "C" __global__ void CLUSTER REGISTERS(128) norm_forward(
    const data_t* x,                         // [N, A, C]
    Affine affine,
    Epilogue epilogue,                       // what ReLU passed is written
    Moments moments,                         // or null; [N, P] and [N, P, C]: of the channels of each sample, in parts
    // outputs
    data_t* out,                             // [N, A, C]; may be x or the residual
    Statistics statistics,                   // or null; of the rows, which are groups of samples
    // sizes
    long long parts,
    Samples sizes) {
    const Span& span = span_of_block(sizes);
    if (!span.there) return;
#if PHASE == WHOLE
#pragma unroll 1
    for (int t = 0; t < span.tiles(); t++) stage<CHUNK>({span.kept(t)}, {x}, Packs(span.tile(t)));
#else
    moments.count += span.sample * parts;
    moments.mean += span.sample * parts * sizes.C;
    moments.m2 += span.sample * parts * sizes.C;
#endif

#if PHASE == ONLY_SUMS
#pragma unroll 1
    for (int t = 0; t < span.tiles(); t++) {
        if (t > 0) __syncthreads();
        const ChannelMoments of_lane = lane_moments(span, t, x, moments, (int)parts);
        const Tile tile = span.tile(t);
        if (tile.looks_after()) set_moments(moments, Span::share(), sizes.C, tile.channel(), of_lane, nullptr);
    }
#else
    __shared__ ChannelAffine given[MOST_LANES];  // of the first tile; read while copies are on their way
    if ((int)threadIdx.x < MOST_LANES) given[threadIdx.x] = read_affine(affine, span.tile(0).channel());
    __shared__ ChannelMoments groups[MOST_LANES], rows[MOST_LANES];  // of this block's groups; over the cluster
#pragma unroll 1
    for (int t = 0; t < span.tiles(); t++) {
        if (t > 0) __syncthreads();
        const ChannelMoments of_lane = lane_moments(span, t, x, moments, (int)parts);
        const double rows_of_lane = PHASE == WHOLE ? (double)(span.end - span.begin) : (double)sizes.A;
        add_lanes(span, span.tile(t), of_lane, rows_of_lane, groups);  // the tile anew: it took no registers
    }
    show_cluster();
    const int g = threadIdx.x;
    if (g < span.groups()) {
        rows[g] = merge_blocks(groups, g);
        if (span.owns()) set_statistics(statistics, rows[g], span.first_row() + g);
    }
    cluster_arrive();  // this block has read what the others have left

    __shared__ Lanes lanes;
#pragma unroll 1
    for (int t = 0; t < span.tiles(); t++) {
        __syncthreads();
        const Tile tile = span.tile(t);
        const Packs packs(tile);
        if (tile.looks_after()) {
            if (t > 0) given[threadIdx.x] = read_affine(affine, tile.channel());
            const ChannelMoments& row = rows[span.group_of(tile.channel())];
            lanes.set(threadIdx.x, make_channel(row.mean, row.var(), affine, given[threadIdx.x]));
        }
        const OwnChannels channels(tile, lanes);
        normalize_all(span.source<CHUNK>(t, packs, x), packs, Left(nullptr, tile), epilogue, channels, out);
    }
    cluster_wait();  // what this block has left may go
#endif
}

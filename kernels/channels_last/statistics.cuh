// Channels last: the sums behind mean and variance of the channels of a thread.
//
// They are taken in chunks of CHUNK rows: in float32 about an element of the chunk, and a second time about its mean. CHUNKS of
// them merge in float32, and then go on in float64. An outlier that makes up most of a channel's variance does so in one chunk,
// whose sums have few roundings.
#pragma once
#include "columns.cuh"
#include "../moments.cuh"

constexpr int CHUNK = 8;
constexpr int CHUNKS = 4;

// What a few chunks of a channel come to: their mean is base + offset.
struct Column {
    acc_t base, offset, m2;
};

// Merges the first `count` packs, all CHUNK if full, which the compiler knows, into columns that have `before` rows.
// A bit of missed tells for which elements float32 did not hold their squares.
template <class Full>
DEVICE void add_chunk(Full full, const raw_t (&raw)[CHUNK], int count, int before, Column (&columns)[WIDTH],
                      unsigned& missed) {
    const auto element = [&](int u, int e) { return widen(Elements<data_t>::get(Words(raw[u]).w, e)); };
    acc_t share = full ? before == 0           ? 1.f
                         : before == CHUNK     ? 1.f / 2
                         : before == 2 * CHUNK ? 1.f / 3
                                               : 1.f / 4
                       : (acc_t)count / (before + count);
    const acc_t weight = before * share;
    unsigned small = 0;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        Column& column = columns[e];
        const Chunk<acc_t> chunk =
            chunk_of<acc_t, CHUNK>(full, full ? CHUNK : count, [&](int u) { return element(u, e); });
        if (before == 0) column = {ADDED_AS_THEY_ARE ? chunk.offset : chunk.base, 0, 0};
        const acc_t apart = (chunk.base - column.base) + chunk.offset - column.offset;
        const acc_t squares = apart * weight * apart + chunk.m2;
        column.offset += apart * share;
        column.m2 += squares;
        if (!IS_FLOAT16 && !(squares > 1e-28f)) small |= 1u << e;
    }
    if (IS_FLOAT16 || small == 0) return;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {  // 0 is right where all values are the same, and only there
        bool same = true;
#pragma unroll
        for (int u = 0; u < CHUNK; u++) same = same && ((!full && u >= count) || element(u, e) == columns[e].base);
        if (small >> e & 1 && !same) missed |= 1u << e;
    }
}

// Adds all packs of a thread to the totals of its channels. Returns a bit for each that float32 did not hold.
template <class Source>
DEVICE unsigned add_all(const Source& x, Packs packs, Total<float> (&totals)[WIDTH]) {
    unsigned missed = 0;
    int rows = 0;  // of the columns
    Column columns[WIDTH];
    const auto flush = [&] {
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            totals[e].add(rows, Chunk<double>{columns[e].base, columns[e].offset, columns[e].m2, true});
        rows = 0;
    };
    as_they_come<CHUNK>(x, packs.count, [&](auto full, int i, int count) {
        raw_t raw[CHUNK];
#pragma unroll
        for (int u = 0; u < CHUNK; u++) raw[u] = full || u < count ? x.get(packs.next(), i + u) : raw[0];
        add_chunk(full, raw, count, rows, columns, missed);
        rows += count;
        if (full && rows == CHUNK * CHUNKS) flush();
    });
    if (rows > 0) flush();
#pragma unroll
    for (int e = 0; e < WIDTH; e++)  // a float32 that was too large has left inf or NaN
        if (!(totals[e].squares - totals[e].squares == 0)) missed |= 1u << e;
    return missed;
}
template <class Source>
DEVICE unsigned add_all(const Source& x, Packs packs, Total<double> (&totals)[WIDTH]) {
    as_they_come<CHUNK>(x, packs.count, [&](auto full, int i, int count) {
        acc_t values[CHUNK][WIDTH];
#pragma unroll
        for (int u = 0; u < CHUNK; u++)
            if (full || u < count) unpack(x.get(packs.next(), i + u), values[u]);
            else unpack(raw_t(), values[u]);
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            totals[e].add(count, chunk_of<acc_t, CHUNK>(full, count, [&](int u) { return values[u][e]; }));
    });
    return 0;
}

// The total of element e of a thread's packs in float64, about the same pivot.
template <class Source>
DEVICE void add_exactly(const Source& x, Packs packs, int e, Total<float>& total) {
    total = Total<float>(total.pivot);
#pragma unroll 1
    for (int i = 0; i < packs.count; i++) {
        acc_t values[WIDTH];
        unpack(x.get(packs.next(), i), values);
        const double away = values[e] - total.pivot;
        total.sum += away;
        total.squares += away * away;
    }
}
template <class Source>
DEVICE void add_exactly(const Source&, const Packs&, int, Total<double>&) {}

// The moments of all threads of the block, in all blocks of the cluster, that have lane q, for thread q. All threads call it.
// pivot is that of lane q, count that of the rows.
DEVICE Moments gather(const Tile& tile, const Total<float> (&totals)[WIDTH], double pivot, double count) {
    double values[2 * WIDTH], sums[2] = {};
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        values[e] = totals[e].sum;
        values[WIDTH + e] = totals[e].squares;
    }
    sum_tile(tile, values, sums);
    Total<float> all(pivot);
    all.sum = sums[0];
    all.squares = sums[1];
    return all.moments(count);
}
DEVICE Moments gather(const Tile& tile, const Total<double> (&totals)[WIDTH], double pivot, double count) {
    __shared__ double means[MOST_LANES];
    double values[WIDTH], sums[1] = {};
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const Moments& own = totals[e].own;
        values[e] = own.count > 0 ? own.count * (own.mean - totals[e].pivot) : 0;
    }
    sum_tile<1>(tile, values, sums);
    const double mean = pivot + sums[0] / count;
    if (tile.looks_after()) means[threadIdx.x] = mean;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const Moments& own = totals[e].own;
        const double delta = own.mean - means[tile.lane + e];
        values[e] = own.count > 0 ? own.m2 + own.count * delta * delta : 0;
    }
    sum_tile<1>(tile, values, sums);
    return {count, mean, sums[0]};
}

// The moments of lane q over the block's rows, or over all `count` rows of the cluster, for thread q. All threads call it.
// x tells where packs are read, first_row is that of the array: its elements are the pivots.
template <class Source>
DEVICE Moments moments_of(const Tile& tile, const Source& x, const Packs& packs, const data_t* first_row, double count) {
    const double pivot = widen(first_row[tile.channel()]);
    acc_t pivots[WIDTH];
    unpack(load(first_row + tile.first + min(tile.lane, tile.lanes - WIDTH)), pivots);
    Total<acc_t> totals[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) totals[e] = Total<acc_t>(pivots[e]);
    const unsigned missed = add_all(x, packs, totals);
#pragma unroll
    for (int e = 0; e < WIDTH; e++)  // each channel by itself: no other one is touched
        if (missed >> e & 1) add_exactly(x, packs, e, totals[e]);
    return gather(tile, totals, pivot, count);
}

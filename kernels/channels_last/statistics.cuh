// Channels last: the sums behind mean and variance, over the packs of a thread.
//
// They are taken in chunks of CHUNK rows: in float32 about an element of the chunk, and a second time about its mean.
// CHUNKS of them merge in float32, and then go on in float64. An outlier that makes up most of a channel's variance
// does so in one chunk, whose sums have few roundings.
#pragma once
#include "columns.cuh"

constexpr int CHUNK = 8;   // rows of a chunk
constexpr int CHUNKS = 4;  // chunks that merge in float32

// Some rows of a channel: their mean, which is base + offset, and the sum of squares of deviations from it.
struct Column {
    acc_t base, offset, m2;
};

// Merges the packs of ROWS rows into columns that have `before` rows so far, a few whole chunks and perhaps some rows.
// Bit e of missed is set if float32 did not hold the squares of element e.
template <int ROWS>
DEVICE void add_rows(const raw_t (&raw)[ROWS], int before, Column (&columns)[WIDTH], unsigned& missed) {
    const acc_t share = ROWS < CHUNK          ? (acc_t)ROWS / (acc_t)(before + ROWS)
                        : before == 0         ? 1
                        : before == CHUNK     ? (acc_t)1 / 2
                        : before == 2 * CHUNK ? (acc_t)1 / 3
                                              : (acc_t)1 / 4;
    const acc_t weight = (acc_t)before * share;
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const auto value = [&](int u) { return widen(Elements<data_t>::get(Words(raw[u]).w, e)); };
        const Chunk<acc_t> rows = chunk_of<acc_t, ROWS>(FirstOnes<Yes>{Yes(), ROWS}, value);
        Column& column = columns[e];
        if (before == 0) column.base = ADDED_AS_THEY_ARE ? rows.offset : rows.base;
        const acc_t apart =
            (ADDED_AS_THEY_ARE ? rows.offset - column.base : (rows.base - column.base) + rows.offset) - column.offset;
        const acc_t squares = apart * weight * apart + rows.m2;
        column.offset += apart * share;
        column.m2 += squares;
        if (!IS_FLOAT16 && !(squares > 1e-28f)) {  // 0 is right where all values are the same, and only there
            bool same = true;
#pragma unroll
            for (int u = 0; u < ROWS; u++) same = same && value(u) == column.base;
            if (!same) missed |= 1u << e;
        }
    }
}

// Adds the next ROWS packs, from number i on, if ROWS is one of the powers of two that make up `count`, the packs of a
// chunk that is not full.
template <int ROWS, class Source>
DEVICE void add_piece(const Source& x, Packs& packs, int& i, int count, Column (&columns)[WIDTH], unsigned& missed) {
    if (!(count & ROWS)) return;
    raw_t raw[ROWS];
#pragma unroll
    for (int u = 0; u < ROWS; u++) raw[u] = x.get(packs.next(), i + u);
    add_rows<ROWS>(raw, i % (CHUNK * CHUNKS), columns, missed);
    i += ROWS;
}

// Adds all packs of a thread to the totals of its channels, which have these pivots. Returns a bit for each element
// whose sums float32 did not hold.
template <class Source>
DEVICE unsigned add_all(const Source& x, Packs packs, const double* pivots, Total<float> (&totals)[WIDTH]) {
    unsigned missed = 0;
    Column columns[WIDTH] = {};
    const auto flush = [&](int rows) {
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            totals[e].pivot = ((const volatile double*)pivots)[e];  // no register is to hold it all the time
            const Column& column = columns[e];
            totals[e].add(Yes(), rows, Chunk<double>{column.base, 0, column.offset, column.m2, true});
            columns[e].offset = columns[e].m2 = 0;
        }
    };
    as_they_come<CHUNK>(x, packs.count, [&](auto full, int i, int count) {
        if (full) {
            raw_t raw[CHUNK];
#pragma unroll
            for (int u = 0; u < CHUNK; u++) raw[u] = x.get(packs.next(), i + u);
            const int before = i % (CHUNK * CHUNKS);  // rows in the columns
            add_rows<CHUNK>(raw, before, columns, missed);
            if (before == CHUNK * (CHUNKS - 1)) flush(CHUNK * CHUNKS);
        } else {  // in few pieces: each merge is rounded
            add_piece<4>(x, packs, i, count, columns, missed);
            add_piece<2>(x, packs, i, count, columns, missed);
            add_piece<1>(x, packs, i, count, columns, missed);
        }
    });
    if (packs.count % (CHUNK * CHUNKS) > 0) flush(packs.count % (CHUNK * CHUNKS));
#pragma unroll
    for (int e = 0; e < WIDTH; e++)  // a float32 that was too large has left inf or NaN
        if (!(totals[e].squares - totals[e].squares == 0)) missed |= 1u << e;
    return missed;
}
template <class Source>
DEVICE unsigned add_all(const Source& x, Packs packs, const double*, Total<double> (&totals)[WIDTH]) {
    as_they_come<CHUNK>(x, packs.count, [&](auto full, int i, int count) {
        acc_t values[CHUNK][WIDTH];
#pragma unroll
        for (int u = 0; u < CHUNK; u++)
            if (full || u < count) unpack(x.get(packs.next(), i + u), values[u]);
            else unpack(raw_t(), values[u]);
#pragma unroll
        for (int e = 0; e < WIDTH; e++)
            totals[e].add(full, count,
                          chunk_of<acc_t, CHUNK>(FirstOnes<decltype(full)>{full, count},
                                                 [&](int u) { return values[u][e]; }));
    });
    return 0;
}

// Adds what a mask leaves of a thread's packs to the totals of its channels, which have these pivots. Returns a bit for
// each element whose sums float32 did not hold.
template <class Source, class T>
DEVICE unsigned add_left(const Source& x, Packs packs, const Left& left, const double* pivots,
                         Total<T> (&totals)[WIDTH]) {
    unsigned missed = 0;
    in_batches<CHUNK>(packs.count, [&](auto full, int i, int count) {
        raw_t raw[CHUNK];
        unsigned some = 0;
#pragma unroll
        for (int u = 0; u < CHUNK; u++) {
            const bool there = full || u < count;
            raw[u] = there ? x.get(packs.next(), i + u) : raw_t();
            if (there) some |= (left.bits(i + u) & 1) << u;
        }
        if (!some) return;
        const Chosen chosen(some);
#pragma unroll
        for (int e = 0; e < WIDTH; e++) {
            const auto value = [&](int u) { return widen(Elements<data_t>::get(Words(raw[u]).w, e)); };
            const Chunk<acc_t> rows = chunk_of<acc_t, CHUNK>(chosen, value);
            totals[e].pivot = ((const volatile double*)pivots)[e];  // no register is to hold it all the time
            totals[e].add(chosen.full, chosen.count, rows);
            if (!rows.held) missed |= 1u << e;
        }
    });
    return missed;
}

// Makes the total of element e anew, over what is left of a thread's packs in float64, about the same pivot.
template <class Source>
DEVICE void add_exactly(const Source& x, Packs packs, const Left& left, int e, double pivot, Total<float>& total) {
    total = Total<float>(pivot);
#pragma unroll 1
    for (int i = 0; i < packs.count; i++) {
        acc_t values[WIDTH];
        unpack(x.get(packs.next(), i), values);
        if (!(left.bits(i) & 1)) continue;
        const double away = values[e] - pivot;
        total.sum += away;
        total.squares += away * away;
    }
}
template <class Source>
DEVICE void add_exactly(const Source&, const Packs&, const Left&, int, double, Total<double>&) {}

// The moments of lane q over all threads of the block, for thread q, from totals about the pivots of the lanes; `count`
// is the number of rows. All threads call it.
DEVICE ChannelMoments gather(const Tile& tile, const Total<float> (&totals)[WIDTH], const double* pivots,
                             double count) {
    double values[2 * WIDTH], sums[2] = {};
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        values[e] = totals[e].sum;
        values[WIDTH + e] = totals[e].squares;
    }
    sum_tile(tile, values, sums);
    Total<float> all(pivots[tile.looks_after() ? threadIdx.x : 0]);
    all.sum = sums[0];
    all.squares = sums[1];
    return all.moments(count);
}
DEVICE ChannelMoments gather(const Tile& tile, const Total<double> (&totals)[WIDTH], const double* pivots,
                             double count) {
    __shared__ double means[MOST_LANES];
    double values[WIDTH], sums[1] = {};
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const ChannelMoments& own = totals[e].own;
        values[e] = own.count > 0 ? own.count * (own.mean - pivots[tile.known_lane() + e]) : 0;
    }
    sum_tile<1>(tile, values, sums);
    const double mean = pivots[tile.looks_after() ? threadIdx.x : 0] + sums[0] / count;
    if (tile.looks_after()) means[threadIdx.x] = mean;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < WIDTH; e++) {
        const ChannelMoments& own = totals[e].own;
        const double delta = own.mean - means[tile.known_lane() + e];
        values[e] = own.count > 0 ? own.m2 + own.count * delta * delta : 0;
    }
    sum_tile<1>(tile, values, sums);
    return {count, mean, sums[0]};
}

// What a mask leaves of the block's rows. All threads call it, once in a kernel.
DEVICE ShareLeft rows_left(const Tile& tile, const Packs& packs, const Left& left) {
    int found = 0;
    index_t first = 0;
    for (int i = packs.count - 1; i >= 0 && tile.lane == 0; i--)  // threads of the same row would find the same
        if (left.bits(i)) {
            found++;
            first = left.at(i);
        }
    return share_left(found, first);
}

// The moments of lane q over what is left of the block's rows, for thread q. first_row is that of the array: its
// elements are the pivots or, under a mask, those of the first row that is left. All threads call it.
template <class Source>
DEVICE ChannelMoments moments_of(const Tile& tile, const Source& x, const Packs& packs, const Left& left,
                                 const data_t* first_row) {
    double count = (double)(tile.end - tile.begin);
    if constexpr (MASKED) {
        const ShareLeft all = rows_left(tile, packs, left);
        count = all.count;
        first_row += (long long)all.first * tile.C;
    }
    __shared__ double pivots[MOST_LANES];
    if (tile.looks_after()) pivots[threadIdx.x] = widen(first_row[tile.channel()]);
    __syncthreads();
    Total<acc_t> totals[WIDTH];
#pragma unroll
    for (int e = 0; e < WIDTH; e++) totals[e] = Total<acc_t>(0);
    unsigned missed;
    if constexpr (MASKED)
        missed = add_left(x, packs, left, pivots + tile.known_lane(), totals);
    else
        missed = add_all(x, packs, pivots + tile.known_lane(), totals);
    if (missed)
#pragma unroll
        for (int e = 0; e < WIDTH; e++)  // each channel by itself: no other one is touched
            if (missed >> e & 1) add_exactly(x, packs, left, e, pivots[tile.known_lane() + e], totals[e]);
    const ChannelMoments all = gather(tile, totals, pivots, count);
    return !MASKED || count > 0 ? all : ChannelMoments{0, 0, 0};
}

// dropout_channels: out = 0 where a channel of a sample is dropped, else x * scale, each channel by a word of its own
//
// Word n * C + c is that of channel c of sample n. In memory samples and channels are the axes A and B, or the other way
// round, with other axes before, between and behind. Threads take packs in turns, of channels that are neighbours where
// nothing is behind them, or else of one row of `I` elements, or of two.
// Mirror: numpy_dropout.dropout_channels
#include "dropout.cuh"

#if INDEX_BITS == 64
typedef unsigned long long place_t;
#else
typedef unsigned place_t;                    // divides in fewer instructions than an int
#endif

// The axes of an array as it lies in memory.
struct Axes {
    place_t A, M, B, I;
    bool swapped, in_order, outer;

    DEVICE Axes(long long swapped, long long size, long long A, long long M, long long B, long long I)
        : A(A), M(M), B(B), I(I), swapped(swapped), in_order(!swapped && size == A * B * I), outer(size > A * M * B * I) {}

    // The number of the channel that a row has.
    DEVICE place_t channel(place_t row) const {
        if (in_order) return row;
        const place_t before = row / B, b = row - before * B;
        place_t a = before / M;
        if (outer) a %= A;
        return swapped ? b * A + a : a * B + b;
    }
};

// Each element has the word of its channel. Channels are neighbours in memory, C is a multiple of WIDTH.
struct NeighbouringChannels {
    const Draw& draw;
    const Axes& axes;
    DEVICE void operator()(index_t at, bool (&dropped)[WIDTH]) const { draw.drops_words(axes.channel(at), dropped); }
    DEVICE bool single(index_t at) const { return draw.drops_word(axes.channel(at)); }
};

// Each element has the word of its row, which has no fewer elements than a pack.
struct Rows {
    const Draw& draw;
    const Axes& axes;
    DEVICE void operator()(index_t at, bool (&dropped)[WIDTH]) const {
        const place_t row = at / axes.I, left = (row + 1) * axes.I - at;  // how many elements are left of the row
        const bool own = draw.drops_word(axes.channel(row));
        bool next = own;
        if (WIDTH > 1 && left < WIDTH) next = draw.drops_word(axes.channel(row + 1));
#pragma unroll
        for (int e = 0; e < WIDTH; e++) dropped[e] = (place_t)e < left ? own : next;
    }
    DEVICE bool single(index_t at) const { return draw.drops_word(axes.channel(at / axes.I)); }
};

extern "C" __global__ void REGISTERS(64) dropout_channels(
    const data_t* x,                         // [O, A, M, B, I]
    Drops drops,
    long long swapped,                       // whether channels are the axis A and samples the axis B
    // outputs
    data_t* out,                             // [O, A, M, B, I]; may be x
    // sizes
    long long size,
    long long A,
    long long M,
    long long B,
    long long I) {
    const Draw draw(drops);
    const Axes axes(swapped, size, A, M, B, I);
    if (WIDTH > 1 && I == 1)
        drop_all<2>(x, draw, NeighbouringChannels{draw, axes}, out, size);
    else
        drop_all<2>(x, draw, Rows{draw, axes}, out, size);
}
